"""One paper, one file, one pure function, registered by the decorator above it.

What a loss takes and returns is the same for every loss of a kind, so that trainers treat them as data:

    preference loss     loss(pair, *, beta, **options) -> (B,)              ``@preference_loss``
                        loss(denoised, liked, *, beta, **options) -> (B,)   with ``paired=False``
    reward loss         loss(reward, **options) -> (B,)                     ``@reward_loss``
    policy objective    loss(step, *, clip_range) -> (B,), metrics          ``@policy_objective``
    trust region        region(log_ratio, advantage, bound, divergence)     ``@trust_region``
                            -> (B,), metrics
    forward objective   loss(step, **options) -> (B,), metrics              ``@forward_objective``

A loss is per sample, float32 or wider; means over samples, weights of samples and sums over processes are the
trainer's. Options are keyword-only parameters. A loss that has no use for beta does not take it. Metrics are detached
and 0-dim. Importing this package imports every file in it, which fills the registries.
"""

from diffalign.plugins import import_modules

import_modules(__name__)
