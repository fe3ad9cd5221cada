import torch
from safetensors.torch import load_file, save_file

from diffalign.models.tensor_cache import TensorCache

TENSORS = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.tensor([True, False])}


def test_what_was_put_comes_back(tmp_path):
    cache = TensorCache(tmp_path)
    assert cache.get("a caption, 🦊") is None
    cache.put("a caption, 🦊", TENSORS)
    found = cache.get("a caption, 🦊")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert cache.get("another") is None
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_folder_keeps_nothing():
    cache = TensorCache(None)
    cache.put("a", TENSORS)
    assert cache.get("a") is None


def test_damaged_files_count_as_missing(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put("a", TENSORS)
    whole = cache.path("a").read_bytes()
    for damage in (b"", whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b"nonsense"):
        cache.path("a").write_bytes(damage)
        assert cache.get("a") is None
    cache.put("a", TENSORS)
    assert cache.get("a") is not None


def test_a_file_of_another_key_or_program_is_not_trusted(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put("a", TENSORS)
    cache.path("b").parent.mkdir(parents=True, exist_ok=True)
    cache.path("b").write_bytes(cache.path("a").read_bytes())
    assert cache.get("b") is None
    save_file(load_file(cache.path("a")), cache.path("a"))  # valid, without a checksum
    assert cache.get("a") is None
