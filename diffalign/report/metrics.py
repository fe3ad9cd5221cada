"""What each logged metric means, what to watch for, and the natural range of its axis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

BETTER, LEARNS, STABLE, COST = "better", "learns", "stable", "cost"
QUESTIONS = {
    BETTER: "Is it better? Held-out prompts, fixed noise",
    LEARNS: "Does it learn? What it trains on",
    STABLE: "Is it stable? The updates",
    COST: "What does it cost?",
}


@dataclass(frozen=True)
class Axis:
    """The natural range of a metric.

    Attributes:
        low: A value that the axis includes, such as 0; None if the metric has no natural lower end.
        high: Likewise at the upper end.
        span: Smallest extent of the axis, so that noise does not fill it.
    """

    low: float | None = None
    high: float | None = None
    span: float = 0.0


SHARE, FROM_ZERO, FREE = Axis(0, 1), Axis(0), Axis()
FEW = Axis(0, 0.1)  # a share that is small in healthy runs


@dataclass(frozen=True)
class Metric:
    """A metric, or a family of metrics.

    Attributes:
        name: Name in ``metrics.jsonl``; ``*`` stands for a reward, a task or a number.
        meaning: What it is, short enough for a caption.
        watch: What a healthy run shows, or a fault looks like; empty if it is only for reference.
        group: Key of ``QUESTIONS``.
        axis: Range of its axis.
    """

    name: str
    meaning: str
    watch: str
    group: str
    axis: Axis = FREE


# Within a group by importance. Exact names come before the families that they belong to.
METRICS = (
    Metric("eval/accuracy", "mean of the first held-out reward over all held-out images",
           "the figure to choose a checkpoint by", BETTER),
    Metric("eval/diversity", "mean pixel distance between images of one prompt",
           "half of its first value or less: images of a prompt become alike; train fewer steps", BETTER, FROM_ZERO),
    Metric("eval/reference_distance", "relative distance of the denoiser's output from the base model's",
           "it rises slowly; a jump at an even reward is drift without gain", BETTER, FROM_ZERO),
    Metric("eval/alarm", "1 where an evaluation suspects that the reward is exploited",
           "look at the images of that step in samples/", BETTER, SHARE),
    Metric("eval/sharpness/*", "how steeply the reward falls around the images",
           "a multiple of its first value: images sit on a ridge of the reward, which is exploited", BETTER, FROM_ZERO),
    Metric("eval/accuracy/*", "mean of the first held-out reward over the images of this task",
           "a task that falls while others rise is paid for by them", BETTER),
    Metric("eval/*", "mean of this reward over all held-out images",
           "a reward that is not trained on should rise too; if it falls, the trained one is exploited", BETTER),
    Metric("reward/mean", "weighted sum of the rewards, mean over the images of a step", "it should rise", LEARNS),
    Metric("accuracy", "share of pairs whose winner the policy favours more than the reference does (chance: 0.5)",
           "0.6 to 0.8 is typical; near 1 at a falling winner_gain is overfitting", LEARNS, SHARE),
    Metric("margin", "how much more the policy favours winners than losers, against the reference",
           "it rises from 0; below 0 the pairs are learned the wrong way round", LEARNS, Axis(0)),
    Metric("reward/std", "spread of the reward over the images of a step",
           "near 0 there is nothing to compare, and nothing is learned", LEARNS, FROM_ZERO),
    Metric("winner_gain", "fall of the winner's denoising error against the reference",
           "below 0 winners get worse too, only losers more so: lower beta or the learning rate", LEARNS, Axis(0)),
    Metric("zero_std_groups", "share of prompts whose images all score the same",
           "they teach nothing; above 0.5 prompts are too easy or too hard", LEARNS, SHARE),
    Metric("loser_gain", "fall of the loser's denoising error against the reference", "it falls below 0", LEARNS),
    Metric("liked_gain", "fall of the denoising error of liked images against the reference",
           "below 0 liked images get worse", LEARNS, Axis(0)),
    Metric("disliked_gain", "fall of the denoising error of disliked images against the reference",
           "it falls below 0", LEARNS),
    Metric("loss", "what the optimizer minimises",
           "for policy gradients near 0 by construction: read the rewards instead", LEARNS),
    Metric("error", "denoising error of the images that are imitated", "it falls", LEARNS, FROM_ZERO),
    Metric("winner_error", "denoising error of winners", "", LEARNS, FROM_ZERO),
    Metric("loser_error", "denoising error of losers", "", LEARNS, FROM_ZERO),
    Metric("liked_error", "denoising error of liked images", "", LEARNS, FROM_ZERO),
    Metric("disliked_error", "denoising error of disliked images", "", LEARNS, FROM_ZERO),
    Metric("negative_margins", "share of pairs with a margin below 0", "it falls below 0.5", LEARNS, SHARE),
    Metric("unscored", "share of images that a reward failed on", "above 0: see train.log", LEARNS, FEW),
    Metric("reward/*/*", "an extra value that this reward reports, mean over the images of a step", "", LEARNS),
    Metric("reward/*", "mean of this reward over the images of a step",
           "one that falls is paid for by the others: change the weights", LEARNS),
    Metric("pairs", "pairs made from the images of a step", "", LEARNS, FROM_ZERO),
    Metric("optimality", "mean weight of the positive policy", "about 0.5", LEARNS, SHARE),
    Metric("implicit_reward", "mean size of the reward that the policy implies", "", LEARNS, FROM_ZERO),
    Metric("best_path", "loss on the best path of each tree", "", LEARNS, FROM_ZERO),
    Metric("gap", "squared distance between the outputs of two gradient paths", "", LEARNS, FROM_ZERO),
    Metric("regulariser", "term that keeps the policy near its data or the base model", "", LEARNS),
    Metric("log_p", "log-likelihood per latent dimension", "", LEARNS),
    Metric("kl", "distance of the policy from the reference, per latent dimension",
           "it rises and levels off; a steep rise is drift: raise kl_beta", STABLE, FROM_ZERO),
    Metric("collapse", "1 while the reward or the diversity is far below its best",
           "go on from an earlier checkpoint with half the learning rate", STABLE, SHARE),
    Metric("approx_kl", "distance of the policy from the one that drew the images",
           "a jump: lower the learning rate or the updates per iteration", STABLE, FROM_ZERO),
    Metric("clip_share", "share of samples whose gradient the trust region removes",
           "above 0.3 updates are too large; always 0 with one update per iteration", STABLE, FEW),
    Metric("grad_norm", "norm of the gradient before clipping",
           "single spikes are skipped; a steady rise ends in collapse: lower the learning rate", STABLE, FROM_ZERO),
    Metric("divergence", "distance of the policy from the one that drew the images",
           "near its bound the trust region stops updates", STABLE, FROM_ZERO),
    Metric("divergence_max", "its largest value among samples", "", STABLE, FROM_ZERO),
    Metric("drift", "squared distance from the lagged policy or the reference",
           "it rises and levels off", STABLE, FROM_ZERO),
    Metric("reference_distance", "squared distance from the base model's output",
           "it rises and levels off", STABLE, FROM_ZERO),
    Metric("ema_distance", "squared distance from the lagged copy's output", "", STABLE, FROM_ZERO),
    Metric("skipped", "steps not taken so far, for a bad loss or gradient", "see skipped.jsonl", STABLE, FROM_ZERO),
    Metric("ratio_mean", "mean ratio of new to old likelihood", "1 at the first update of an iteration", STABLE),
    Metric("log_ratio_max", "largest change of a log-likelihood",
           "it jumps before a collapse", STABLE, FROM_ZERO),
    Metric("logit_size", "mean size of the logit of a pair", "above 5 the loss is saturated: lower beta", STABLE,
           FROM_ZERO),
    Metric("logit_std", "spread of the logit over pairs", "", STABLE, FROM_ZERO),
    Metric("margin_size", "mean size of the margin, which sets beta", "", STABLE, FROM_ZERO),
    Metric("beta", "strength of the preference, adapted to the margins", "", STABLE, FROM_ZERO),
    Metric("margin_bin/*", "margin within this fifth of the noise levels, of all pairs", "", STABLE),
    Metric("share_bin/*", "share of pairs within this fifth of the noise levels", "", STABLE, SHARE),
    Metric("sigmoid", "mean weight of a group", "", STABLE, SHARE),
    Metric("shift", "mean implied reward, which separates liked from disliked", "", STABLE),
    Metric("decay/*", "decay of this lagged copy of the weights", "", STABLE, SHARE),
    Metric("lr", "learning rate", "", STABLE, FROM_ZERO),
    Metric("images_per_second", "images drawn and scored per second", "", COST, FROM_ZERO),
    Metric("kept_fraction", "share of images with an advantage, which are trained on", "", COST, SHARE),
    Metric("passes_saved", "forward and backward passes saved by leaving the others out", "", COST, FROM_ZERO),
    Metric("cache/computed_share", "share of layers that the rollout cache computed", "", COST, SHARE),
    Metric("time/*", "seconds of this part of a step", "", COST, FROM_ZERO),
)  # fmt: skip


def describe(name: str) -> Metric | None:
    """Return what is known of a metric, under its own name; None for one that is unknown, e.g. of a custom loss."""
    found = next((metric for metric in METRICS if fnmatchcase(name, metric.name)), None)
    return None if found is None else replace(found, name=name)


def explained(name: str) -> list[str]:
    """Return the lines that ``diffalign explain`` prints about a metric; none for an unknown one."""
    found = describe(name)
    if found is None:
        return []
    watch = [f"  watch: {found.watch}"] if found.watch else []
    return [f"{name}: a metric of metrics.jsonl ({QUESTIONS[found.group].rstrip('?')})", f"  {found.meaning}", *watch]


def legend() -> list[str]:
    """Return the lines about the metrics to watch, by group."""
    lines = []
    for group, question in QUESTIONS.items():
        if own := [metric for metric in METRICS if metric.group == group and metric.watch]:
            lines += [
                question,
                *(line for m in own for line in (f"  {m.name}: {m.meaning}", f"      watch: {m.watch}")),
            ]
    return lines


def place(name: str) -> int:
    """Return the position of a metric by importance; unknown ones come last."""
    return next((i for i, metric in enumerate(METRICS) if fnmatchcase(name, metric.name)), len(METRICS))
