"""What people do to parameters, gradients and state between steps: the next step follows it, or refuses it."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import collage
from collage import kernels
from collage.kernels import looking, native
from collage.optim import batches
from collage.optim.states import Entry, States
from comparing import assert_same, values

BACKENDS = [name for name in ("eager", "native") if collage.backends()[name]]
backends = pytest.mark.parametrize("backend", BACKENDS)


def made(backend: str, sizes: tuple[int, ...] = (40, 7), **options: Any) -> collage.AdamW:
    params = [nn.Parameter(values((size,), i)) for i, size in enumerate(sizes)]
    return collage.AdamW(params, lr=1e-3, weight_decay=0.1, backend=backend, **options)


def params_of(opt: collage.AdamW) -> list[nn.Parameter]:
    return opt.param_groups[0]["params"]


def advance(opt: collage.AdamW, steps: int = 1, seed: int = 0) -> collage.AdamW:
    for step in range(steps):
        for i, param in enumerate(params_of(opt)):
            param.grad = values(tuple(param.shape), 100 + 10 * (seed + step) + i, param.dtype)
        opt.step()
    return opt


def replaced_state(opt: collage.AdamW) -> None:
    entry = opt.state[params_of(opt)[0]]
    entry["exp_avg"] = entry["exp_avg"] * 2


def updated_entry(opt: collage.AdamW) -> None:
    entry = opt.state[params_of(opt)[0]]
    entry.update(exp_avg=entry["exp_avg"] * 2)


def merged_states(opt: collage.AdamW) -> None:
    param = params_of(opt)[0]
    opt.state.update({param: {**opt.state[param], "exp_avg": opt.state[param]["exp_avg"] * 2}})


def merged_by_operator(opt: collage.AdamW) -> None:
    param = params_of(opt)[0]
    opt.state |= {param: {**opt.state[param], "exp_avg": opt.state[param]["exp_avg"] * 2}}


def exchanged_state_memory(opt: collage.AdamW) -> None:
    state = opt.state[params_of(opt)[0]]["exp_avg"]
    state.data = state.data * 2


def shared_state_memory(opt: collage.AdamW) -> None:
    state = opt.state[params_of(opt)[0]]["exp_avg"]
    state.mul_(2)
    state.share_memory_()


def offloaded_and_back(opt: collage.AdamW) -> None:
    state = opt.state[params_of(opt)[0]]["exp_avg"]
    kept = state * 2
    size = state.untyped_storage().nbytes()
    state.untyped_storage().resize_(0)
    state.untyped_storage().resize_(size)
    state.copy_(kept)


def in_place(opt: collage.AdamW) -> None:
    opt.state[params_of(opt)[0]]["exp_avg"].mul_(2)


CHANGES = [
    *(replaced_state, updated_entry, merged_states, merged_by_operator),
    *(exchanged_state_memory, shared_state_memory, offloaded_and_back, in_place),
]


@backends
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_moment_is_the_one_that_is_stepped(change: Callable[[collage.AdamW], None], backend: str) -> None:
    opt, reference = (advance(made(backend), 2) for _ in range(2))
    change(opt)
    fresh = made(backend)
    state = reference.state_dict()
    state["state"][0]["exp_avg"] *= 2
    for mine, theirs in zip(params_of(fresh), params_of(reference), strict=True):
        mine.data.copy_(theirs)
    fresh.load_state_dict(state)
    assert_same(advance(opt, 1, seed=5), advance(fresh, 1, seed=5))


@backends
@pytest.mark.parametrize("change", [*CHANGES[:4], shared_state_memory, in_place], ids=lambda change: change.__name__)
def test_a_changed_moment_of_many_small_parameters_is_the_one_that_is_stepped(
    change: Callable[[collage.AdamW], None], backend: str
) -> None:
    sizes = tuple(range(1, 41))
    opt, reference = (advance(made(backend, sizes), 2) for _ in range(2))
    change(opt)
    if change is shared_state_memory:  # it shares the memory of all, but doubles one
        assert opt.state[params_of(opt)[1]]["exp_avg"].is_shared()
    first = params_of(reference)[0]
    reference.state[first]["exp_avg"] = reference.state[first]["exp_avg"] * 2
    assert_same(advance(opt, 1, seed=5), advance(reference, 1, seed=5))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"]
)
def test_copies_of_an_optimizer_of_many_small_parameters_share_nothing_and_go_on_alike(copied) -> None:
    opt = advance(made("eager", tuple(range(1, 41))), 2)
    assert len({opt.state[p]["exp_avg"].untyped_storage()._cdata for p in params_of(opt)}) == 1
    other = copied(opt)
    assert len(pickle.dumps(opt)) < 200_000
    assert_same(advance(opt, 2, seed=3), advance(other, 2, seed=3))


def test_state_of_many_small_parameters_stays_one_tensor_when_some_miss_a_step_or_it_is_loaded() -> None:
    opt = advance(made("eager", tuple(range(1, 41))), 2)
    params = params_of(opt)
    whole = opt.state[params[0]]["exp_avg"].untyped_storage()._cdata
    for param in params:
        param.grad = torch.ones_like(param)
    params[3].grad = None
    opt.step()
    assert {opt.state[p]["exp_avg"].untyped_storage()._cdata for p in params} == {whole}
    opt.load_state_dict(opt.state_dict())
    advance(opt, 1)
    assert len({opt.state[p]["exp_avg"].untyped_storage()._cdata for p in params}) == 1


@backends
def test_a_parameter_of_other_memory_or_order_is_stepped_where_it_is(backend: str) -> None:
    opt, reference = (advance(made(backend, sizes=(36, 7)), 2) for _ in range(2))
    first = params_of(opt)[0]
    first.data = first.data.clone()
    assert_same(advance(opt, 1, seed=4), advance(reference, 1, seed=4))
    square = nn.Parameter(values((6, 6), 3))
    turned = nn.Parameter(values((6, 6), 3))
    both = [collage.AdamW([param], backend=backend) for param in (square, turned)]
    for each in both:
        advance(each, 1)
    turned.data = turned.data.t()
    grad = values((6, 6), 9)
    square.data = square.data.t().contiguous()
    for param, each in zip((square, turned), both, strict=True):
        param.grad = grad
        each.step()
    assert torch.equal(square, turned)


@backends
@pytest.mark.parametrize("change", ["cast", "grown", "state dtype", "state shape", "state order", "state gone"])
def test_state_that_does_not_fit_its_parameter_is_refused_and_nothing_changes(change: str, backend: str) -> None:
    opt = advance(made(backend), 1)
    param = params_of(opt)[0]
    entry = opt.state[param]
    if change == "cast":
        param.data = param.data.float()
    elif change == "grown":
        param.data = torch.cat([param.data, param.data])
    elif change == "state dtype":
        entry["exp_avg"] = entry["exp_avg"].float()
    elif change == "state gone":
        del entry["exp_avg_sq_lo"]
    elif change == "state shape":
        entry["exp_avg"] = entry["exp_avg"][:5].clone()
    else:
        entry["exp_avg"] = torch.zeros(80, dtype=torch.bfloat16)[::2]
    before = [p.detach().clone() for p in params_of(opt)]
    refusal = r"(exp_avg|param_lo) of a parameter is .*wanted|of a parameter lacks exp_avg_sq_lo"
    with pytest.raises(ValueError, match=refusal):
        advance(opt, 1)
    assert all(torch.equal(p, kept) for p, kept in zip(params_of(opt), before, strict=True))


@backends
def test_autograd_notices_that_a_step_has_changed_a_parameter(backend: str) -> None:
    # After a first step: creating the state writes the parameter by torch's own operations.
    opt = advance(made(backend), 1)
    param = params_of(opt)[0]
    loss = (param * param).sum()
    advance(opt, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
def test_a_gradient_seen_through_a_minus_sign_is_stepped_with_it(backend: str) -> None:
    opt, reference = made(backend, (40,)), made(backend, (40,))
    for seed in (1, 2):
        params_of(opt)[0].grad = torch._neg_view(values((40,), seed))
        params_of(reference)[0].grad = -values((40,), seed)
        opt.step()
        reference.step()
    assert_same(opt, reference)


class Doubled(Tensor):
    """Has no memory: computes its elements when asked."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [2 * a.inner if isinstance(a, Doubled) else a for a in args]
        return func(*unwrapped, **(kwargs or {}))


@backends
def test_a_gradient_without_memory_of_its_own_is_made_real(backend: str) -> None:
    opt, reference = made(backend, (40,)), made(backend, (40,))
    params_of(opt)[0].grad = Doubled(values((40,), 3))
    params_of(reference)[0].grad = 2 * values((40,), 3)
    opt.step()
    reference.step()
    assert_same(opt, reference)


def turned(grad: Tensor) -> Tensor:
    return grad.t().contiguous().t()


def spread(grad: Tensor) -> Tensor:
    return torch.stack([grad, grad], -1)[..., 0]


def behind_a_minus(grad: Tensor) -> Tensor:
    return torch._neg_view(-grad)


def doubling(grad: Tensor) -> Tensor:
    return Doubled(grad / 2)


def with_history(grad: Tensor) -> Tensor:
    return grad.clone().requires_grad_()


@backends
@pytest.mark.parametrize("reader", [True, False], ids=["in one call", "by methods"])
@pytest.mark.parametrize("made_of", [turned, spread, behind_a_minus, doubling, with_history], ids=lambda f: f.__name__)
def test_a_gradient_unlike_those_before_it_is_stepped_by_its_values(
    made_of: Callable[[Tensor], Tensor], reader: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reader:
        monkeypatch.setattr(looking, "_reader", lambda: None)
    opt, reference = (
        collage.AdamW([nn.Parameter(values((6, 7), seed)) for seed in (1, 2)], backend=backend) for _ in range(2)
    )
    for step in range(6):
        for i, (mine, theirs) in enumerate(zip(params_of(opt), params_of(reference), strict=True)):
            theirs.grad = values((6, 7), 10 * step + i)
            mine.grad = made_of(theirs.grad) if i == 1 and step in (2, 3) else theirs.grad.clone()
        opt.step()
        reference.step()
        assert_same(opt, reference)


@backends
def test_a_step_takes_one_look_at_what_is_stepped_and_one_at_the_gradients(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = advance(made(backend), 2)
    seen = []

    def counted(tensors: Any, *rest: Any, **options: Any) -> looking.Looks:
        seen.append(list(tensors))
        return looking.look(tensors, *rest, **options)

    for module in (batches, native):
        monkeypatch.setattr(module, "look", counted)
    advance(opt, 1)
    params, grads = seen
    assert [id(param) for param in params[:2]] == [id(param) for param in params_of(opt)]
    assert [id(grad) for grad in grads] == [id(param.grad) for param in params_of(opt)]


def shrunk(grad: Tensor) -> None:
    grad.data = grad.data[:30].clone()


def widened(grad: Tensor) -> None:
    grad.data = grad.data.double()


@backends
@pytest.mark.parametrize("change", [shrunk, widened], ids=lambda change: change.__name__)
def test_a_gradient_that_became_another_in_its_place_is_refused_and_nothing_changes(
    change: Callable[[Tensor], None], backend: str
) -> None:
    opt = advance(made(backend), 3)
    for param in params_of(opt):
        param.grad = torch.ones_like(param)
    grad = params_of(opt)[0].grad
    assert grad is not None
    before = [param.detach().clone() for param in params_of(opt)]
    change(grad)
    with pytest.raises((TypeError, ValueError), match=r"a parameter .*(they must agree|allowed: its own or float32)"):
        opt.step()
    assert all(torch.equal(p, kept) for p, kept in zip(params_of(opt), before, strict=True))


def test_a_parameter_without_memory_takes_the_eager_step_and_insisting_on_another_is_refused() -> None:
    def insist(backend: str | None) -> None:
        opt = made("eager", (8,))
        opt.param_groups[0]["backend"] = backend
        advance(opt, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_have_memory", lambda tensors: False)
        insist(None)
        if collage.backends()["native"]:
            with pytest.raises(ValueError, match=r"backend 'native' steps memory, and a parameter .*backend=None"):
                insist("native")


class Clipped(collage.Rounded):
    """A storage of a user's own, made of another."""

    def store(self, value: Tensor, parts: Any, bits: Tensor | None, scratch: Tensor) -> None:
        super().store(value.clamp_(-2, 2), parts, bits, scratch)


def test_a_storage_of_ones_own_is_not_taken_for_the_one_it_is_made_of() -> None:
    strategy = collage.Strategy("clipped", Clipped(), collage.Rounded(), collage.Rounded())
    param = nn.Parameter(torch.full((10,), 1.5, dtype=torch.bfloat16))
    opt = collage.AdamW([param], lr=1.0, strategy=strategy)
    for _ in range(3):
        param.grad = -torch.ones_like(param)
        opt.step()
    assert (param == 2).all()


@backends
def test_a_first_step_with_zero_lr_counts_for_all_parameters_or_for_none(backend: str) -> None:
    opt = made(backend)
    opt.param_groups[0]["lr"] = 0.0
    params_of(opt)[0].grad, params_of(opt)[1].grad = torch.zeros(40, dtype=torch.bfloat16), values((7,), 1)
    opt.step()
    assert [int(opt.state[param]["step"]) for param in params_of(opt)] == [1, 1]


def test_the_state_is_a_dict_of_dicts_to_whoever_handles_it() -> None:
    opt = advance(made("eager"), 1)
    param = params_of(opt)[0]
    assert isinstance(opt.state, defaultdict)
    assert isinstance(opt.state[param], Entry)
    rebuilt = type(opt.state[param])(OrderedDict(opt.state[param]))
    assert dict(rebuilt) == dict(opt.state[param])
    for plain in (copy.copy(opt.state), opt.state.copy()):
        assert type(plain) is defaultdict
        assert list(plain) == list(opt.state)
    assert opt.state.setdefault(param) is opt.state[param]
    opt.state = defaultdict(dict)
    advance(opt, 1)
    assert isinstance(opt.state, States)
    assert int(opt.state[param]["step"]) == 1


def test_counts_of_changes_count_every_way_to_change() -> None:
    states = States({"p": {"a": 1}})
    entry = states["p"]
    ways: list[Callable[[], Any]] = [
        lambda: entry.__setitem__("b", 2),
        lambda: entry.update(c=3),
        lambda: entry.setdefault("d", 4),
        lambda: entry.pop("b"),
        lambda: entry.popitem(),
        lambda: entry.__ior__({"e": 5}),
        lambda: entry.__delitem__("e"),
        lambda: entry.clear(),
        lambda: states.__setitem__("q", {}),
        lambda: states.update({"r": {}}),
        lambda: states["s"],
        lambda: states.pop("q"),
        lambda: states.__delitem__("r"),
        lambda: states.popitem(),
        lambda: states.clear(),
    ]
    for way in ways:
        before = states.changes.count
        way()
        assert states.changes.count > before


def test_a_backend_that_steps_wrongly_is_found_out_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_checked", set())
    step = kernels._STEPS["eager"]

    def without_low_part(batch: Any, inputs: Any) -> Tensor | None:
        sums = step(batch, inputs)
        for state in batch.states:
            state["param_lo"].zero_()
        return sums

    monkeypatch.setitem(kernels._STEPS, "eager", without_low_part)
    opt = made("eager")
    before = [param.detach().clone() for param in params_of(opt)]
    with pytest.raises(RuntimeError, match="backend 'eager' does not step as defined"):
        advance(opt, 1)
    assert all(torch.equal(p, kept) for p, kept in zip(params_of(opt), before, strict=True))


def test_an_expansion_that_does_not_hold_its_value_is_found_out_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_checked", set())
    store = collage.Expansion.store

    def without_low_part(self: Any, value: Any, parts: Any, bits: Any, scratch: Any) -> None:
        store(self, value, parts, bits, scratch)
        parts[1].zero_()

    monkeypatch.setattr(collage.Expansion, "store", without_low_part)
    with pytest.raises(RuntimeError, match=r"hi \+ lo does not hold the value"):
        advance(made("eager"), 1)
