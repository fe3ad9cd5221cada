"""Networks of judges for several raters: models A and B of PAL (arXiv 2406.08469), over K shared prototypes.

Rater i weighs the prototypes by w_i, a point of the simplex, learned as a softmax; the mean rater has the mean of the
weights. A prototype is a point in model A, the same for all prompts, and a map of the prompt in model B:

    A:  a_i = sum_k w_ik p_k,           score = s (1 - |f(q) - f(a_i)|^2 / 2)
    B:  a_i(c) = sum_k w_ik g_k(t(c)),  score = s cos(v, a_i(c))

with the logit scale s, the pooled text t(c), unit embeddings v of the image and t of the prompt, and q = [v; t]. Both
start as the backbone, s cos(v, t), up to the small spread of the prototypes.

Departures from the paper, and from its published code:
1. The likelihood of a comparison is that of Bradley and Terry with ties, of the difference of scores; the code has a
   hinge, or a logistic loss of the scaled distances. A score of A falls with the square of the distance.
2. f maps the embeddings of image and prompt, side by side, as the code's vanilla case does, by two layers beside a skip
   connection, which is v - t here: an item is nearer to the origin the better it matches its prompt.
3. The last layer of f starts at zero, and prototypes near to one another instead of drawn from a unit sphere.
4. On the unit sphere the cosine of B orders images as the distance does.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from diffalign.rewards.support.judge_network import JudgeNetwork
from diffalign.rewards.support.preprocess import at_least_float32

SPREAD = 0.02  # of prototypes at the start, relative to the head that they start from, or to unit length


class MixtureNetwork(JudgeNetwork, ABC):
    """A judge of several raters, each a mixture of prototypes.

    Attributes:
        rater_logits: (raters, prototypes), whose softmax are the weights of raters.
    """

    def __init__(self, backbone: PreTrainedModel, raters: int, prototypes: int, seed: int = 0) -> None:
        super().__init__(backbone)
        self.raters = raters
        # Equal weights would be a saddle point: no gradient tells prototypes apart that all raters use alike.
        self.rater_logits = nn.Parameter(F.one_hot(torch.arange(raters) % prototypes, prototypes).float())

    def weights(self, rater: Tensor) -> Tensor:
        """Return the weights (N, K) of raters (N,); -1 is the mean rater."""
        every = self.rater_logits.softmax(-1)
        every = torch.cat([every, every.mean(0, keepdim=True)])
        return every[rater]

    def mean_weights(self) -> Tensor:
        """Return the weights (K,) of the mean rater."""
        return self.weights(torch.tensor([-1], device=self.rater_logits.device))[0]

    def train_head(self) -> None:
        """Let the heads, the prototypes and the weights of raters train."""
        super().train_head()
        self.rater_logits.requires_grad_(True)

    def rater_state(self) -> dict[str, Tensor]:
        """Return the tensors of prototypes and raters, as files hold them."""
        return {**self.prototype_state(), "weights": self.rater_logits.softmax(-1)}

    @abstractmethod
    def prototype_state(self) -> dict[str, Tensor]:
        """Return the tensors of prototypes."""

    @classmethod
    @abstractmethod
    def of_rater(cls, backbone: PreTrainedModel, state: Mapping[str, Tensor], rater: int) -> JudgeNetwork:
        """Build the judge of a rater from what ``rater_state`` returned; -1 is the mean rater."""


class IdealPoints(MixtureNetwork):
    """Model A of PAL: raters have ideal points in a latent space, whatever the prompt.

    Attributes:
        points: (prototypes, 2 D), in the space of image and prompt embeddings side by side.
        latent: The two layers of f beside its skip connection.
    """

    name = "pal_a"
    format = 2
    bounds = (-float("inf"), 100.0)

    def __init__(self, backbone: PreTrainedModel, raters: int, prototypes: int, seed: int = 0) -> None:
        super().__init__(backbone, raters, prototypes)
        width = self.text_head.out_features
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(prototypes, 2 * width, generator=generator, device="cpu")
        self.points = nn.Parameter(SPREAD * F.normalize(noise, dim=-1).to(self.text_head.weight.device))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, last = nn.Linear(2 * width, width), nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.latent = nn.Sequential(first, nn.ReLU(), last)

    def embed_items(self, image: Tensor, text: Tensor) -> Tensor:
        """Map embeddings of images and prompts, (..., D) each, to the latent space: f(q), (..., D)."""
        pair = torch.cat([image, text], -1).to(self.points.dtype)
        return image - text + at_least_float32(self.latent(pair))

    def ideal_points(self, rater: Tensor) -> Tensor:
        """Return the ideal points of raters (N,) in the latent space: f(a_i), (N, D)."""
        points = self.weights(rater) @ at_least_float32(self.points)
        return self.embed_items(*points.chunk(2, -1))

    def similarity(self, image: Tensor, text: Tensor, rater: Tensor | None = None) -> Tensor:
        """Return 1 - |f(q) - f(a)|^2 / 2: (B, N)."""
        rater = torch.full((len(text),), -1, device=text.device) if rater is None else rater
        items = self.embed_items(image, text[:, None].expand_as(image))
        return 1 - (items - self.ideal_points(rater)[:, None]).square().sum(-1) / 2

    def train_head(self) -> None:
        """Let the heads, the latent map, the points and the weights of raters train."""
        super().train_head()
        self.latent.requires_grad_(True)
        self.points.requires_grad_(True)

    def prototype_state(self) -> dict[str, Tensor]:
        """Return points and latent map."""
        latent = {f"latent.{name}": value for name, value in self.latent.named_parameters()}
        return {"points": self.points, **latent}

    @classmethod
    def single(cls, backbone: PreTrainedModel) -> IdealPoints:
        """Build the judge of one rater, whose ideal point is the only prototype."""
        return cls(backbone, raters=1, prototypes=1)

    @classmethod
    @torch.no_grad()
    def of_rater(cls, backbone: PreTrainedModel, state: Mapping[str, Tensor], rater: int) -> JudgeNetwork:
        """Build the judge of a rater from what ``rater_state`` returned; -1 is the mean rater."""
        network = cls.single(backbone)
        weights = torch.cat([state["weights"], state["weights"].mean(0, keepdim=True)])
        network.points.copy_(weights[rater][None] @ state["points"])
        for name, parameter in network.latent.named_parameters():
            parameter.copy_(state[f"latent.{name}"])
        return network


class PrototypeMaps(MixtureNetwork):
    """Model B of PAL: the ideal point of a rater is a map of the prompt.

    A combination of linear maps is one, so that the judge of any rater is a plain model of its family.

    Attributes:
        prototypes: The maps of pooled texts that raters combine.
    """

    name = "pal_b"

    def __init__(self, backbone: PreTrainedModel, raters: int, prototypes: int, seed: int = 0) -> None:
        super().__init__(backbone, raters, prototypes)
        self.prototypes = nn.ModuleList()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(prototypes):
            head = copy.deepcopy(self.text_head)
            noise = torch.randn(head.weight.shape, generator=generator, device="cpu").to(head.weight)
            with torch.no_grad():
                head.weight += SPREAD * head.weight.std() * noise
            self.prototypes.append(head)

    def embed_texts(self, pooled: Tensor, rater: Tensor | None = None) -> Tensor:
        """Map pooled texts (N, W) to ideal points (N, D) of unit length. rater: (N,); None for the mean rater."""
        rater = torch.full((len(pooled),), -1, device=pooled.device) if rater is None else rater
        points = torch.stack([head(pooled) for head in self.prototypes], 1)
        return F.normalize((self.weights(rater)[..., None] * at_least_float32(points)).sum(1), dim=-1)

    def plain_head(self) -> dict[str, Tensor]:
        """Return weight and bias of the text head of the mean rater."""
        return combined(self.prototype_state(), self.mean_weights())

    def train_head(self) -> None:
        """Let the image head, the prototypes and the weights of raters train."""
        super().train_head()
        self.text_head.requires_grad_(False)
        self.prototypes.requires_grad_(True)

    def prototype_state(self) -> dict[str, Tensor]:
        """Return the maps."""
        return {f"prototypes.{name}": value for name, value in self.prototypes.named_parameters()}

    @classmethod
    def single(cls, backbone: PreTrainedModel) -> JudgeNetwork:
        """Build the judge of one rater, a plain model."""
        return JudgeNetwork(backbone)

    @classmethod
    @torch.no_grad()
    def of_rater(cls, backbone: PreTrainedModel, state: Mapping[str, Tensor], rater: int) -> JudgeNetwork:
        """Build the judge of a rater from what ``rater_state`` returned; -1: that of the backbone, the mean rater."""
        network = cls.single(backbone)
        if rater >= 0:
            for name, value in combined(state, state["weights"][rater]).items():
                network.text_head.get_parameter(name).copy_(value)
        return network


def combined(state: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Return the convex combination of maps: name of a parameter -> tensor. weights: (K,)."""
    names = [name.removeprefix("prototypes.0.") for name in state if name.startswith("prototypes.0.")]
    heads = {name: torch.stack([state[f"prototypes.{k}.{name}"] for k in range(len(weights))]) for name in names}
    return {name: torch.einsum("k,k...->...", weights, head) for name, head in heads.items()}


NETWORKS: Mapping[str, type[MixtureNetwork]] = {network.name: network for network in (IdealPoints, PrototypeMaps)}


def network_class(rater_model: str) -> type[JudgeNetwork]:
    """Return the class of a model of raters; the empty name is one judge of all."""
    return NETWORKS[rater_model] if rater_model else JudgeNetwork
