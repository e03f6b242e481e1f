"""The attention seam: a strategy in place of softmax(Q K^T) V, for every model class alike.

Every attention of the known classes ends in `torch.nn.functional.scaled_dot_product_attention`, with q, k
and v after normalisation and rotary embedding. While a strategy is applied to any model, that function is
replaced by a dispatcher. A hook on each attention module tells the dispatcher whose call it is; calls from
elsewhere, from cross-attention and from text encoders go to the original function. This keeps
`torch.compile` at one graph and holds when gradient checkpointing runs a block again during the backward
pass.

One strategy acts on a model at a time. Its place is last: what other methods do to q, k and v on their way
lies between the dispatcher and it. Where a method runs the blocks on some tokens and keeps the keys and
values of the others (`keep_keys`), the call is completed first, and a strategy gets the whole grid, its
queries too, those of the other tokens as they last were; without a strategy only the tokens that run ask.

B batch, h heads, Lq queries, Lk keys, d head dim.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.seams import executors  # noqa: F401  (they take the original function: import before it is replaced)
from ditkit.seams.anatomy import View, child, describe
from ditkit.seams.errors import SeamError
from ditkit.seams.keys import KeptKeys, KeyPolicy
from ditkit.seams.layout import TokenLayout
from ditkit.seams.stats import attention_flops, stands_for
from ditkit.seams.steps import Step

if TYPE_CHECKING:
    from ditkit.seams.host import Host

Kind = Literal["self", "joint", "cross"]
_PLANS_KEPT = 8


class AttentionStrategy(Protocol):
    """What a method puts in place of dense attention.

    A strategy whose work depends on the step may have a method `begin(step: Step)` too: it is called at the
    start of each forward, outside compiled code.
    """

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> Any:
        """The static part (permutations, masks, lists), made once for each layout, before the blocks run.

        Raises:
            SeamError: the strategy can't work on this layout; nothing has been computed yet.
        """
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
        plan: Any,
    ) -> Tensor:
        """Attention of one module.

        Args:
            q, k, v: (B, h, L, d), L = `call.layout.length`.
            mask: what the model passed, bool (True: may be read) or additive, broadcastable to (B, h, L, L).
            scale: None for 1 / sqrt(d).

        Returns:
            (B, h, L, d).
        """
        ...


class Dense:
    """The strategy that changes nothing."""

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> None:
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
        plan: Any,
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@dataclass(eq=False)
class AttentionCall:
    """Whose call it is: one object for each attention module, the changing parts read when asked for.

    Args:
        layer: 0, 1, ... over the attention modules that a strategy serves, in running order; -1 for
            cross-attention.
        name: path of the module in the model.
        kind: `"joint"`: text and image in one sequence; `"self"`: image tokens only; `"cross"`: image reads
            text.
        view: which tokens see each other: all, those of one frame, or one place through time.
    """

    layer: int
    name: str
    kind: Kind
    seam: AttentionSeam
    view: View = "all"
    served: int = 0

    @property
    def layout(self) -> TokenLayout:
        """The layout of this module's sequence: without text where the module sees image tokens only, one
        frame or one place where it sees no more than that."""
        return _seen_by(self.kind, self.view, self.seam.layout)

    @property
    def step(self) -> Step:
        """Where the denoising loop is."""
        return self.seam.host.clock.step

    @property
    def state(self) -> dict[Any, Any]:
        """What the strategy keeps for this layer and guidance branch; emptied at each new generation."""
        return self.seam.states.setdefault((self.name, self.step.branch), {})

    def attended(self, share: float) -> None:
        """Note the share of query-key pairs, 0..1, that this call computed (not counted in compiled code)."""
        if not torch.compiler.is_compiling():
            self.seam.host.stats.attended(share)


def _seen_by(kind: Kind, view: View, layout: TokenLayout) -> TokenLayout:
    if view != "all":
        frames, height, width = layout.grid
        layout = dataclasses.replace(layout, grid=(1, height, width) if view == "frame" else (frames, 1, 1))
    if kind == "self" and layout.joint_text_length:
        return dataclasses.replace(layout, text="none", text_length=0, text_mask=None)
    return layout


class _Current(threading.local):
    """The attention module that is running in this thread."""

    call: AttentionCall | None = None


class _Layout(threading.local):
    """The layout of the forward that is running in this thread."""

    value: TokenLayout | None = None


_current = _Current()
_lock = threading.Lock()
_seams: list[AttentionSeam] = []
_replaced: list[
    tuple[Callable[..., Tensor], Callable[..., Tensor]]
] = []  # (original, dispatcher) while installed


def _dispatcher(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        call = _current.call
        layout = None if call is None else call.seam.match(call, query, key)
        if call is None or layout is None:
            return original(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if dropout_p or is_causal:
            raise SeamError(
                f"{call.name}: attention with dropout or a causal mask can't be replaced "
                f"(dropout_p={dropout_p}, is_causal={is_causal})"
            )
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        _current.call = None  # what the strategy itself calls is the original
        try:
            return call.seam.attend(query, key, value, attn_mask, scale, call, layout)
        finally:
            _current.call = call

    return scaled_dot_product_attention


def _install(seam: AttentionSeam) -> None:
    with _lock:
        if not _seams:
            original = F.scaled_dot_product_attention
            _replaced.append((original, _dispatcher(original)))
            F.scaled_dot_product_attention = _replaced[-1][1]
        _seams.append(seam)


def _uninstall(seam: AttentionSeam) -> None:
    with _lock:
        _seams.remove(seam)
        if not _seams:
            original, ours = _replaced.pop()
            # Someone who wrapped our dispatcher meanwhile keeps the wrapper: without a call it is the
            # original.
            if F.scaled_dot_product_attention is ours:
                F.scaled_dot_product_attention = original


class AttentionSeam:
    """The attention of one model that carries methods."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.strategy: AttentionStrategy | None = None
        self.kept: KeptKeys | None = None
        self._served: list[AttentionCall] = []
        self.states: dict[Any, dict[Any, Any]] = {}
        self.counts: Counter[str] = Counter()  # calls: self, joint, cross, other; eager runs only
        self._kinds: set[tuple[Kind, View, int]] = set()
        self._running = _Layout()
        self._recent: dict[Any, TokenLayout] = {}  # by length, for blocks that run again in the backward pass
        self._plans: dict[Any, Any] = {}
        self._grid: tuple[int, int, int] | None = None

    @property
    def layout(self) -> TokenLayout:
        layout = self._running.value
        if layout is None:
            raise SeamError("the layout is known only while the model's forward is running")
        return layout

    def use(self, strategy: AttentionStrategy) -> None:
        """Put a strategy in place; it goes when the host's methods are taken off.

        Raises:
            SeamError: there is a strategy already, or the model does not use scaled_dot_product_attention.
        """
        self.host.require("attention")
        if self.strategy is not None:
            raise SeamError(f"{self.host.name} has an attention strategy already: {self.strategy!r}")
        self._hook()
        self._kinds = {
            (call.kind, call.view, int(getattr(module, "heads", 0) or getattr(module, "num_heads", 0)))
            for call, module in self._calls()
            if call.kind != "cross"
        }
        self.strategy = strategy
        self.host.clock.on_reset(self.states.clear)
        # Another grid of as many tokens is another amount of work.
        self.host.stats.modes.append(lambda: self._grid)

    def keep_keys(self, policy: KeyPolicy) -> KeptKeys:
        """Keep keys and values of image tokens for forwards that run on some of the tokens.

        Raises:
            SeamError: another method does so already, or the model does not use scaled_dot_product_attention.
        """
        self.host.require("attention")
        if self.kept is not None:
            raise SeamError(f"the keys of {self.host.name} are kept already, for {self.kept.policy!r}")
        self._hook()
        self.kept = KeptKeys(policy)
        self.host.clock.on_reset(self.kept.drop)
        self.host.stats.holds(self.kept.nbytes)
        return self.kept

    @property
    def layers(self) -> int:
        """How many attention modules a strategy serves."""
        return len(self._served)

    def _hook(self) -> None:
        """Catch the calls of every attention module of the blocks; done once."""
        if self.strategy is not None or self.kept is not None:
            return
        calls = self._calls()
        for call, module in calls:
            _check_backend(call, module)
        self._served = [call for call, _ in calls if call.kind != "cross"]
        _install(self)
        self.host.on_remove(self._remove)
        for call, module in calls:
            self.host.hooks.around(module, "attention", _named(call, module))

    def _remove(self) -> None:
        _uninstall(self)
        self.strategy = None
        if self.kept is not None:
            self.kept.drop()
            self.kept = None
        self.states.clear()
        self._plans.clear()
        self._recent.clear()

    def begin(self) -> None:
        """A forward of the model starts: find its layout and have the strategy's plans ready.

        Raises:
            SeamError: the call has no single grid, or the strategy can't work on it.
        """
        if self.strategy is None and self.kept is None:
            return
        layout = self.host.layout()
        begin = getattr(self.strategy, "begin", None)
        if begin is not None:
            begin(self.host.clock.step)
        self._running.value, self._grid = layout, layout.grid
        device = self.host.device()
        for kind, view, heads in self._kinds:
            seen = _seen_by(kind, view, layout)
            self._recent[kind, view, seen.length] = layout
            if heads:
                self._plan(seen, heads, device)

    def end(self) -> None:
        """The forward is over, or was given up."""
        self._running.value = None

    def match(self, call: AttentionCall, query: Tensor, key: Tensor) -> TokenLayout | None:
        """The layout of a call over the whole sequence; None for cross-attention and additions."""
        if call.kind == "cross":
            self._count("cross")
            return None
        # Outside the model's forward a block runs again, in the backward pass of gradient checkpointing: the
        # latest layout of that length is the one it ran with.
        layout = self._running.value or self._recent.get((call.kind, call.view, query.shape[-2]))
        length = None if layout is None else _seen_by(call.kind, call.view, layout).length
        active = self.host.tokens.active if self.kept is not None else None
        if layout is not None and length is not None and active is not None:
            length += len(active.indices) - layout.image_length
        if layout is None or query.shape[-2] != length or key.shape[-2] != length:
            self._count("other")
            return None
        self._count(call.kind)
        return layout

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
        layout: TokenLayout,
    ) -> Tensor:
        outer = self._running.value
        self._running.value = layout
        try:
            if not torch.compiler.is_compiling():
                call.served += 1
            if self.kept is None:
                return self._strategy(q, k, v, mask, scale, call)
            return self._completed(q, k, v, mask, scale, call)
        finally:
            self._running.value = outer

    def _strategy(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, call: AttentionCall
    ) -> Tensor:
        if self.strategy is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        plan = self._plan(call.layout, q.shape[1], q.device)
        if torch.compiler.is_compiling():
            return self.strategy.attend(q, k, v, mask, scale, call, plan)
        with stands_for(attention_flops(q.shape, k.shape, v.shape)):
            return self.strategy.attend(q, k, v, mask, scale, call, plan)

    def _completed(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, call: AttentionCall
    ) -> Tensor:
        """A call whose keys may be those of some tokens only."""
        assert self.kept is not None
        active = self.host.tokens.active
        if active is None:
            self.kept.keep(call, q, k, v, mask, scale, queries=self.strategy is not None)
            return self._strategy(q, k, v, mask, scale, call)
        if active.rows is not None and call.state:
            raise SeamError(
                f"{call.name}: {self.strategy!r} keeps a state for the whole batch, but its samples run on "
                "tokens of their own; sample one prompt at a time"
            )
        merged = self.kept.merge(call, call.layout, active, q, k, v)
        out = self._strategy(merged.q, merged.k, merged.v, merged.mask, merged.scale, call)
        return out if merged.positions is None else out.index_select(2, merged.positions)

    def _plan(self, layout: TokenLayout, heads: int, device: torch.device) -> Any:
        assert self.strategy is not None
        key = (layout.grid, layout.text, layout.text_length, heads, device)
        if key not in self._plans:
            if len(self._plans) >= _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            # A plan serves every prompt of that length: which text is valid comes with each call's mask.
            self._plans[key] = self.strategy.plan(dataclasses.replace(layout, text_mask=None), heads, device)
        return self._plans[key]

    def _count(self, what: str) -> None:
        # Compiled code would take a counter for a constant and compile again at each call.
        if not torch.compiler.is_compiling():
            self.counts[what] += 1

    def modules(self) -> list[tuple[str, Kind]]:
        """Path and kind of every attention module of the blocks, in running order."""
        return [(call.name, call.kind) for call, _ in self._calls()]

    def _calls(self) -> list[tuple[AttentionCall, nn.Module]]:
        """Every attention module of the blocks with its call object, in running order."""
        calls, layer = [], 0
        for name, kind, view, module in _attentions(self.host.model):
            own = kind != "cross"
            calls.append((AttentionCall(layer if own else -1, name, kind, self, view), module))
            layer += own
        return calls


def attention_modules(model: nn.Module) -> list[tuple[str, Kind, nn.Module]]:
    """Path, kind and module of every attention of the blocks of a model, in running order."""
    return [(name, kind, module) for name, kind, _, module in _attentions(model)]


def _attentions(model: nn.Module) -> list[tuple[str, Kind, View, nn.Module]]:
    names = {module: name for name, module in model.named_modules()}
    return [
        (names[module], attention.kind, stack.view, module)
        for stack, _, block in describe(model).blocks(model)
        for attention in stack.attention
        if (module := child(block, attention.module)) is not None
    ]


def _named(call: AttentionCall, module: nn.Module) -> Callable[..., Any]:
    """What runs around an attention module's forward: the dispatcher learns whose call it gets."""

    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer, served = _current.call, call.served
        _current.call = call
        try:
            out = forward(*args, **kwargs)
        finally:
            _current.call = outer
        if call.kind != "cross" and not torch.compiler.is_compiling() and call.served == served:
            processor = type(getattr(module, "processor", module)).__name__
            raise SeamError(
                f"{call.name} ({processor}) made no attention call over the whole token grid through "
                "scaled_dot_product_attention; use the default processor and backend "
                "(model.set_attention_backend('native')), and no method that drops tokens"
            )
        return out

    return around


def _check_backend(call: AttentionCall, module: nn.Module) -> None:
    """Processors that do not end in scaled_dot_product_attention, or that split the sequence over devices."""
    processor = getattr(module, "processor", None)
    backend = getattr(processor, "_attention_backend", None)
    backend = getattr(backend, "value", backend)
    if backend not in (None, "native"):
        raise SeamError(
            f"{call.name} uses the attention backend {backend!r}, which a strategy can't reach; "
            "call model.set_attention_backend('native') first"
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise SeamError(
            f"{call.name} runs context-parallel: each device holds a part of the sequence, so the token grid "
            "is not known to it; disable parallelism or the attention method"
        )
