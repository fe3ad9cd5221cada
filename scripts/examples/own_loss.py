"""Train Diffusion-DPO with a loss of one's own, a reward in words of Python, and a callback that stops early.

python scripts/examples/own_loss.py runs/own_loss
"""

import sys
from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, TrainerCallback, TrainerControl, TrainerState
from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


@preference_loss("steep", idea="a steeper logistic", source="this example", beta=400.0, margin=True)
def steep(pair: DenoisedPair, *, beta: float | Tensor, slope: float = 2.0) -> Tensor:
    """softplus(-slope beta margin): (B,)."""
    return softplus(-slope * beta * pair.margin)


class StopWhenSure(TrainerCallback):
    """Stop once nine of ten pairs of a batch are ranked as labelled."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = kwargs["metrics"].get("accuracy", 0.0) >= 0.9


def main(folder: str, **changes: Any) -> None:
    args = DiffusionDPOConfig.from_yaml("diffusion_dpo/shapes", loss="steep", output_dir=folder, **changes)
    result = DiffusionDPOTrainer(args=args, callbacks=[StopWhenSure()]).train()
    print(f"step {result.step}: {result.base.get('eval/accuracy')} -> {result.tuned.get('eval/accuracy')}")


if __name__ == "__main__":
    main(sys.argv[1])
