"""Train a reward, a judge of one's own, on preference labels."""
