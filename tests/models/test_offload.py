"""Offloaded parts: when they are loaded, that they are unloaded, and that results do not change."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffalign.models import family_names, get_family, load_model
from diffalign.models.offload import PARTS, TEXT_ENCODERS, VAE, OffloadedModule, part_of, to_device
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rollout.generate import decode
from tests.conftest import PIPELINE
from tests.models.logged_offload import LoggedOffload

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


class Tied(nn.Module):
    """A convolution whose layout is that of a VAE's, a buffer, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        self.three = self.one
        self.register_buffer("shift", torch.ones(4))


def addresses(network):
    return [t.data_ptr() for t in [*network.parameters(), *network.buffers()]]


def test_loading_copies_weights_and_unloading_restores_the_host_tensors():
    network, layouts = Tied(), lambda: [(t.dtype, t.stride(), t.requires_grad) for t in network.parameters()]
    module, home, known, plain = OffloadedModule([network], CPU), addresses(network), network.state_dict(), layouts()
    kept = {name: tensor.clone() for name, tensor in known.items()}
    with module.pinned():
        assert addresses(network) == home  # pinning does not load
        module.load()
        there = addresses(network)
        assert not {*there} & {*home}
        assert network.three.weight is network.one.weight
        assert layouts() == plain
        with module.pinned():
            module.load()
        assert addresses(network) == there  # the outer phase is not over
        assert all(torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items())
    assert addresses(network) == home
    assert layouts() == plain


def test_errors_unload_it(monkeypatch):
    network = Tied()
    module, home, moves = OffloadedModule([network], CPU), addresses(network), []

    def half(tensor, *arguments, own=torch.Tensor.to, **options):
        moves.append(tensor)
        if len(moves) == 3:
            raise torch.OutOfMemoryError
        return own(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", half)
    with module.pinned():
        with pytest.raises(torch.OutOfMemoryError):
            module.load()
        assert not module.resident
        assert addresses(network) == home
        module.load()
        assert module.resident
    monkeypatch.undo()
    with pytest.raises(KeyError), module.pinned():  # noqa: PT012
        module.load()
        raise KeyError
    assert addresses(network) == home


class Loaded(Exception):
    pass


class RaisesOnLoad:
    """An offloaded part that raises instead of loading."""

    pins = 1

    def __init__(self, part):
        self.part = part

    def pinned(self):
        return nullcontext()

    def load(self):
        raise Loaded(self.part)


@pytest.mark.parametrize("name", family_names())
def test_every_family_declares_the_parts_it_needs(name):
    model, image = object.__new__(get_family(name)), torch.zeros(1, 3, 16, 16)
    model.offloaded = {part: RaisesOnLoad(part) for part in PARTS}
    calls = {
        lambda: model.encode(["a"]): TEXT_ENCODERS,
        # Each conditioning of Qwen-Image-Edit brings its own negative.
        lambda: model._seen("a", image) if hasattr(model, "_seen") else model.unconditional(): TEXT_ENCODERS,
        lambda: model.decode(image): VAE,
        lambda: model.encode_images(image): VAE,
    }
    for call, part in calls.items():
        with pytest.raises(Loaded, match=part):
            call()


def networks(**quantised):
    names = ("text_encoder", "text_encoder_2", "vae", "transformer")
    found = {name: nn.Linear(2, 2) for name in names}
    for name, method in quantised.items():
        found[name].quantization_method = method
    return SimpleNamespace(components={**found, "tokenizer": object(), "text_encoder_3": None})


def places(pipeline):
    return {name: part.weight.device for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def test_offloaded_parts_stay_in_host_memory_and_the_rest_moves():
    pipeline = networks()
    offloaded = to_device(pipeline, ELSEWHERE, [TEXT_ENCODERS])
    assert {**places(pipeline)} == {
        "text_encoder": CPU,
        "text_encoder_2": CPU,
        "vae": ELSEWHERE,
        "transformer": ELSEWHERE,
    }
    assert {part: len(module.networks) for part, module in offloaded.items()} == {TEXT_ENCODERS: 2}
    pipeline = networks()
    assert to_device(pipeline, ELSEWHERE, [VAE], without="transformer").keys() == {VAE}
    assert {name for name, where in places(pipeline).items() if where == CPU} == {"vae", "transformer"}


def test_quantised_components_stay_where_they_were_loaded():
    pipeline = networks(text_encoder_2="bitsandbytes", transformer="bitsandbytes")
    with pytest.warns(UserWarning, match="text_encoder_2 is quantised, and stays on the device"):
        offloaded = to_device(pipeline, ELSEWHERE, [TEXT_ENCODERS])
    assert [*offloaded[TEXT_ENCODERS].networks] == [pipeline.components["text_encoder"]]
    assert places(pipeline)["vae"] == ELSEWHERE
    assert {places(pipeline)[name] for name in ("text_encoder_2", "transformer")} == {CPU}  # as they were


def test_on_a_cpu_nothing_is_offloaded_and_names_are_checked():
    moves = []
    pipeline = SimpleNamespace(components={}, to=moves.append)
    assert to_device(pipeline, CPU, [TEXT_ENCODERS, VAE]) == {}
    assert moves == [CPU]
    with pytest.raises(ValueError, match="no part is named text; known: text_encoders, vae"):
        to_device(pipeline, CPU, ["text"])


@pytest.fixture
def loads_logged(frozen, monkeypatch):
    """The shipped pipeline with all parts offloaded, and the list of loads."""
    log = []
    offloaded = {part: LoggedOffload(part_of(frozen.pipeline, part).values(), log, part) for part in PARTS}
    monkeypatch.setattr(frozen, "offloaded", offloaded)
    yield frozen, log
    assert not any(module.resident for module in offloaded.values())


@contextmanager
def not_offloaded(model):
    """Disable offloading within this context."""
    offloaded, model.offloaded = model.offloaded, {}
    yield
    model.offloaded = offloaded


def test_new_prompts_load_encoders_once_and_known_ones_never(loads_logged, tmp_path):
    model, log = loads_logged
    texts = ["a red circle", "two stars"]
    with not_offloaded(model):
        plain = PromptEmbeddingCache(model)(texts)
    encoded = PromptEmbeddingCache(model, folder=tmp_path)
    found = encoded(texts)
    assert all(torch.equal(found.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert log == [TEXT_ENCODERS]
    encoded(texts)
    encoded.prepare(["a star"], empty=True)
    assert log == [TEXT_ENCODERS] * 2
    again = PromptEmbeddingCache(model, folder=tmp_path)  # all of it is on disk
    again([*texts, "a star"])
    assert torch.equal(again.empty.tensors["embeds"], encoded.empty.tensors["embeds"])
    assert log == [TEXT_ENCODERS] * 2


def test_slices_are_decoded_in_one_load_and_gradients_need_pinning(loads_logged):
    model, log = loads_logged
    latents = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0), requires_grad=True)
    with model.keeping(VAE, TEXT_ENCODERS):
        for _ in range(2):
            decode(model, latents)
        model.decode(latents).square().mean().backward()
    assert log == [VAE]
    with pytest.raises(RuntimeError, match=r'decode with gradients .* within model.keeping\("vae"\)'):
        model.decode(latents)
    found, latents.grad = latents.grad, None
    with not_offloaded(model):
        model.decode(latents).square().mean().backward()
    assert torch.equal(found, latents.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_part_takes_memory_only_while_loaded_and_results_match():
    cuda, texts = torch.device("cuda"), ["a red circle", "two stars"]
    found, sizes = [], []
    for offload in ((), (TEXT_ENCODERS, VAE)):
        model = load_model(PIPELINE, max_sequence_length=16)
        before = torch.cuda.memory_allocated()
        model.to_device(cuda, offload)
        assert model.device.type == "cuda"
        sizes.append(torch.cuda.memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()
        conditioning = PromptEmbeddingCache(model)(texts)
        x = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0)).to(cuda)
        images = decode(model, x)
        assert not torch.cuda.memory_allocated() - before > sizes[-1] + 2**20
        found.append((*conditioning.tensors.values(), images))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    weights = sum(t.nbytes for part in PARTS for n in part_of(model.pipeline, part).values() for t in n.parameters())
    assert sizes[1] < sizes[0] - 0.9 * weights
