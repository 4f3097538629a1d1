"""Safetensors folders: what is written is read, and what is damaged is named."""

import json

import pytest
import torch

from models.checkpoints.shards import INDEX, SINGLE, ShardReader, write_shards


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 8, 4, generator=generator)
    yield from ((f"expert.{i}", stack[i]) for i in range(3))  # views of one storage
    yield "transposed", torch.randn(4, 8, generator=generator).mT
    yield "half", torch.randn(5, generator=generator).bfloat16()
    yield "scalar", torch.tensor(3.0)


def check_equal(reader):
    written = dict(make_tensors())
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in written.items()}
    for name, tensor in written.items():
        assert reader.get(name).dtype == tensor.dtype
        assert torch.equal(reader.get(name), tensor)


def test_one_file_has_no_index(tmp_path):
    tmp_path.chmod(0o755)
    write_shards(tmp_path, make_tensors(), max_bytes=1e9)
    assert (tmp_path / SINGLE).stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    check_equal(ShardReader(tmp_path))


def test_files_stay_below_the_limit_unless_one_tensor_is_larger(tmp_path):
    write_shards(tmp_path, make_tensors(), max_bytes=300)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, INDEX])
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in make_tensors())
    check_equal(ShardReader(tmp_path))
    (tmp_path / "small").mkdir()
    write_shards(tmp_path / "small", make_tensors(), max_bytes=1)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) == 6
    check_equal(ShardReader(tmp_path / "small"))


@pytest.mark.parametrize("keep", [0, 5, 100, -3])
def test_a_truncated_file_is_named(tmp_path, keep):
    write_shards(tmp_path, make_tensors(), max_bytes=300)
    victim = tmp_path / "model-00002-of-00002.safetensors"
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is not a whole"):
        ShardReader(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write_shards(tmp_path, make_tensors(), max_bytes=300)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors"):
        ShardReader(tmp_path)


def test_other_formats_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"has neither .* weights are read from safetensors files"):
        ShardReader(tmp_path)


def test_index_and_files_must_agree(tmp_path):
    write_shards(tmp_path, make_tensors(), max_bytes=300)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["half"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"does not hold the tensors that .* lists"):
        ShardReader(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match="is not a safetensors index"):
        ShardReader(tmp_path)
