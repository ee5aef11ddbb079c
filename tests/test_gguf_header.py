"""The header of a GGUF file, held against the gguf package's own reader."""

import tracemalloc

import gguf
from gguf import GGMLQuantizationType as Type
import numpy as np
import pytest
from test_gguf import draw
from test_gguf import write as write_model

from tokenlora_jax.config import InputError
from tokenlora_jax.formats.gguf import metadata, open_gguf


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.gguf"


def test_headers_are_what_the_gguf_package_reads(path):
  """Ours against the slow twin: each field, each tensor, and their bytes."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_custom_alignment(64)
  rng = np.random.default_rng(0)
  for i, kind in enumerate(gguf.GGUFValueType):
    if kind in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY):
      continue
    wide = kind.name.startswith("FLOAT")
    value = 0.1 if wide else kind == gguf.GGUFValueType.BOOL or i
    writer.add_key_value(f"one.{kind.name}", value, kind)
    many = [value, 0.5 if wide else type(value)(0), value]
    writer.add_key_value(
      f"many.{kind.name}", many, gguf.GGUFValueType.ARRAY, sub_type=kind
    )
  writer.add_string("text", "gr\u00fc\u00df \U0001f600")
  writer.add_string("no.text", "")
  writer.add_array("texts", ["", "a", "\u0120b", "c" * 300])
  shapes = {"a": (3, 64), "b": (5,), "c": (2, 3, 32), "d": (7, 32)}
  kinds = {"a": Type.Q4_1, "b": Type.F32, "c": Type.F16, "d": Type.BF16}
  for name, shape in shapes.items():
    values = rng.standard_normal(shape, np.float32)
    data = gguf.quants.quantize(values, kinds[name])
    writer.add_tensor(name, data, raw_dtype=kinds[name])
  writer.add_tensor("whole", np.arange(4, dtype=np.int32))
  writer.add_tensor("double", np.arange(4, dtype=np.float64))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  ours, theirs = open_gguf(path), gguf.GGUFReader(path)
  counts = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
  want = {
    name: field.contents()
    for name, field in theirs.fields.items()
    if name not in counts
  }
  assert {name: metadata(ours, name) for name in ours.fields} == want
  assert len(want) > 25
  assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
  for tensor in theirs.tensors:
    mine = ours.tensors[tensor.name]
    assert mine.kind == tensor.tensor_type
    assert mine.shape == tuple(reversed(tensor.shape.tolist()))
    assert (mine.offset, mine.dtype) == (tensor.data_offset, tensor.data.dtype)
    assert mine.stored == tensor.data.shape


# Lengths of more than there is: of a text, a list and a tensor's axes, and how
# many values and tensors there are.
@pytest.mark.parametrize("count", [2**20, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("what", ["tensors", "values", "text", "list", "axis"])
def test_lengths_beyond_the_file_are_one_line(path, count, what):
  write_model(path, draw(), texts=["a", "b"])
  data = bytearray(path.read_bytes())
  key = {
    "text": b"general.architecture",
    "list": b"texts",
    "axis": b"blk.0.attn_q.weight",
  }
  place = {"tensors": 8, "values": 16}.get(what)
  if place is None:
    place = data.index(key[what]) + len(key[what])
    # Behind a type; a list's members have one, too; behind a number of axes.
    place += {"text": 4, "list": 8, "axis": 4}[what]
  data[place : place + 8] = count.to_bytes(8, "little")
  path.write_bytes(data)
  tracemalloc.start()
  with pytest.raises(InputError) as caught:
    open_gguf(path)
  told = str(caught.value)
  used = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert "\n" not in told
  assert "not a whole GGUF file" in told
  assert "ends at byte" in told
  assert used < 4 * len(data)
