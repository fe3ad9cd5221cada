"""Push a run to the Hugging Face hub: weights, card, pictures and configuration, at the end or with each checkpoint."""

from __future__ import annotations

import glob
import shlex
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from diffalign.log import get_logger
from diffalign.runtime.callbacks import TrainerCallback, TrainerControl, TrainerState
from diffalign.runtime.manifest import checked
from diffalign.runtime.products import CONFIG, EXPORTS
from diffalign.runtime.trainer_config import TrainerConfig

logger = get_logger(__name__)

# Beside the exports: what others need to repeat the run. Caches, optimizer states and rollouts hold private data.
PUBLISHED = (CONFIG, "metrics.jsonl", "samples/example-*.png")
OF_CHECKPOINTS = ("pytorch_lora_weights.safetensors", "negative_prompt.safetensors")


def create_repository(name: str, private: bool) -> None:
    """Create the repository of a run if it does not exist, so that a missing right is known before the training.

    Raises:
        ValueError: The hub refuses, or cannot be reached.
    """
    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
    except Exception as error:  # of the hub, of its client, or of the client's HTTP library
        raise ValueError(
            f"push_to_hub {name}: the hub refuses: {_short(error)}; log in with `hf auth login`, check owner and "
            "rights, or leave push_to_hub out and upload the run folder later"
        ) from error


class HubCallback(TrainerCallback):
    """Upload the LoRA of each checkpoint in the background, and the run at its end.

    A failure is a warning with the command that uploads later: the run and its folder are whole without the hub.

    Args:
        name: Repository, "owner/name".
        checkpoints: Whether to upload the LoRA of each checkpoint too.
    """

    def __init__(self, name: str, checkpoints: bool) -> None:
        self.name, self.checkpoints, self.api = name, checkpoints, HfApi()
        self.waiting: Future[Any] | None = None

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Upload the LoRA of a checkpoint, unless the last upload still runs."""
        if not self.checkpoints or (self.waiting is not None and not self.waiting.done()):
            return
        self._finish_upload()
        folder: Path = kwargs["path"]
        self.waiting = self.api.upload_folder(
            repo_id=self.name, folder_path=folder, path_in_repo=folder.name, allow_patterns=list(OF_CHECKPOINTS),
            commit_message=f"Step {state.global_step}", run_as_future=True,
        )  # fmt: skip

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Upload the run."""
        if not state.is_world_process_zero:
            return
        self._finish_upload()
        try:
            self.api.upload_folder(
                repo_id=self.name, folder_path=args.output_dir, allow_patterns=published(args.output_dir),
                commit_message=f"Step {state.global_step}, end of training",
            )  # fmt: skip
        except Exception as error:  # whatever it is, the run is on disk
            again = upload_command(self.name, args.output_dir)
            self._warn(f"failed: {_short(error)}; the run is complete: {again}")
        else:
            logger.info(f"hub         {self.name}")

    def _finish_upload(self) -> None:
        """Wait for the upload of the last checkpoint."""
        if self.waiting is not None and (error := self.waiting.exception()) is not None:
            self._warn(f"failed for a checkpoint, and goes on: {_short(error)}")
        self.waiting = None

    def _warn(self, text: str) -> None:
        warnings.warn(f"push_to_hub {self.name} {text}", stacklevel=2)


def published(folder: Path) -> list[str]:
    """List the patterns of the files that a run publishes: its exports, and ``PUBLISHED``.

    The hub's client matches ``*`` across folders, so a pattern of a suffix would match caches and checkpoints too.
    """
    names = checked(folder / EXPORTS)[0].get("files", {})
    tops = {name.split("/")[0]: "/" in name for name in names}
    exports = (f"{glob.escape(top)}/*" if nested else glob.escape(top) for top, nested in sorted(tops.items()))
    return [*(pattern for pattern in exports if pattern != "samples/*"), *PUBLISHED]


def upload_command(name: str, folder: Path) -> str:
    """Return the shell command that uploads what a run publishes."""
    chosen = " ".join(f"--include {shlex.quote(pattern)}" for pattern in published(folder))
    return f"hf upload {name} {shlex.quote(str(folder))} . {chosen}"


def hub_callbacks(config: TrainerConfig) -> list[TrainerCallback]:
    """Return the callback that uploads a run, if its configuration names a repository."""
    if config.push_to_hub is None:
        return []
    return [HubCallback(config.push_to_hub, config.hub_strategy == "checkpoints")]


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
