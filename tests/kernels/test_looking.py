"""One call tells of many tensors what torch's own methods tell of each."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collage.kernels import looking, native
from collage.kernels.library import Library
from collage.kernels.looking import look, look_by_methods, records
from comparing import values

needs_reader = pytest.mark.skipif(
    looking._reader() is None, reason="the library or torch's exchange table is missing: torch's methods serve"
)
WIDE = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool)
BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(6, 8, dtype=dtype)


def odd_strides(*strides: int) -> Tensor:
    """A single row of five, and nothing else of any size."""
    return torch.zeros(400).as_strided((1, 5, 1), strides)


CASES = {
    **{str(dtype).removeprefix("torch."): matrix(dtype) for dtype in (*WIDE, *BYTES)},
    "a number": torch.tensor(1.5),
    "one element": torch.ones(1),
    "empty": torch.empty(0),
    "empty of many dimensions": torch.empty(3, 0, 5),
    "empty and turned": torch.empty(3, 0, 5).permute(2, 0, 1),
    "empty view at the end": torch.ones(6)[6:],
    "rows after the first": matrix()[1:],
    "a run within": torch.arange(20)[3:9],
    "turned": matrix().t(),
    "turned row": torch.zeros(1, 8).t(),
    "every second": torch.zeros(40)[::2],
    "columns": matrix()[:, 2:5],
    "expanded": torch.zeros(1, 4).expand(3, 4),
    "one dimension, odd strides": odd_strides(77, 1, 13),
    "one dimension, spread": odd_strides(5, 2, 1),
    "channels last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last of one channel": torch.zeros(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "many dimensions": torch.zeros(2, 1, 2, 1, 2, 1, 2),
    "parameter": nn.Parameter(matrix()),
    "parameter, turned": nn.Parameter(matrix().t()),
    "with history": matrix().requires_grad_() * 2,
    "behind a minus": torch._neg_view(matrix()),
}


@needs_reader
@pytest.mark.parametrize("example", [None, matrix(), matrix(torch.bfloat16)], ids=["any", "float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_one_call_tells_what_the_methods_tell(
    case: str, example: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [values((3, 4), 1), CASES[case], matrix()]
    wanted = look_by_methods(tensors, example)
    monkeypatch.setattr(looking, "look_by_methods", lambda *_: pytest.fail("the methods were asked"))
    assert look(tensors, example) == wanted
    assert look(tuple(tensors), example) == wanted


@pytest.mark.parametrize("read", [look, look_by_methods])
def test_looks_tell_where_elements_stand_and_how_many_stand_in_order(read: Any) -> None:
    inner = matrix()[2:4]
    tensors = [matrix(), inner, matrix().t(), matrix(torch.float16), torch.empty(2, 0)]
    looks = read(tensors, matrix())
    assert list(looks.addresses) == [tensor.data_ptr() for tensor in tensors]
    assert list(looks.sizes) == [48, 16, -1, -1, 0]
    assert list(read(tensors).sizes) == [48, 16, -1, 48, 0]
    assert looks.classes == {Tensor}
    assert read([nn.Parameter(inner)]).classes == {nn.Parameter}
    assert read([]) == (looks.addresses[:0], looks.sizes[:0], set())


@needs_reader
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: setattr(tensor, "data", tensor.data.clone()),
        lambda tensor: setattr(tensor, "data", tensor.data[:3]),
        lambda tensor: tensor.t_(),
        lambda tensor: tensor.untyped_storage().resize_(1 << 20),
    ],
    ids=["moved", "cut", "turned in place", "memory exchanged"],
)
def test_looks_at_a_tensor_that_changed_differ_and_others_are_equal(change: Any) -> None:
    tensors = [matrix(), matrix()]
    before = look(tensors)
    assert look(tensors) == before
    change(tensors[1])
    assert look(tensors) != before


@needs_reader
def test_records_are_of_plain_tensors_and_wherever_they_lie_the_looks_are_the_same() -> None:
    tensors = [matrix() for _ in range(20)]
    wanted = look(tensors)
    held = records(tensors)
    assert held is not None
    assert len(set(held)) == 40
    moved = array("Q", [1, 2**64 - 1] * 20)
    for given in (held, moved, held[:30], held[:0]):
        assert look(tensors, records=given) == wanted
    assert records([matrix(), matrix().as_subclass(Named)]) is None


@pytest.mark.parametrize("tensor", [None, 3, matrix().to_sparse(), [matrix()]], ids=["None", "int", "sparse", "list"])
def test_what_has_no_memory_is_refused_as_the_methods_refuse_it(tensor: Any) -> None:
    raised = []
    for read in (look, look_by_methods):
        with pytest.raises((AttributeError, RuntimeError, TypeError)) as error:
            read([matrix(), tensor])
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


class Named(Tensor):
    pass


@pytest.mark.parametrize("other", [torch.empty(3, device="meta"), matrix().as_subclass(Named)], ids=["meta", "class"])
def test_tensors_that_the_table_has_no_word_for_and_subclasses_are_told_by_the_methods(
    other: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, asked = look_by_methods([matrix(), other]), []
    monkeypatch.setattr(looking, "look_by_methods", lambda *given: asked.append(given) or wanted)
    assert look([matrix(), other]) is wanted
    assert len(asked) == 1
    assert list(wanted.sizes) == [48, other.numel()]


NO_READER = {
    "without the library": ("native_library", lambda: Library(missing="not built")),
    "without a table": ("_table", lambda: None),
    "with a table of another version": ("_table", lambda: looking._Table(major=2, view=8)),
    "with a table that lacks the function": ("_table", lambda: looking._Table(major=1, view=None)),
}


@pytest.mark.parametrize("case", NO_READER)
def test_the_methods_tell_where_the_call_cannot_be_made(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, *NO_READER[case])
    monkeypatch.setattr(looking, "_reader", looking._reader.__wrapped__)
    asked = []
    monkeypatch.setattr(looking, "look_by_methods", lambda *given: asked.append(given))
    look([matrix()])
    assert len(asked) == 1
    assert looking._reader() is None


def test_a_torch_without_a_table_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Tensor, "__dlpack_c_exchange_api__", raising=False)
    assert looking._table() is None


@needs_reader
def test_the_call_is_made_where_table_and_library_are_there() -> None:
    table = looking._table()
    assert table is not None
    assert table.major == 1
    assert not native.unavailable()
