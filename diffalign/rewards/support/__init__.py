"""What rewards share: loading weights, images, prompts, HTTP, and isolation of failures."""
