"""The attention seam on every class: who is served, what a strategy is told, what stays behind: nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ditkit
from ditkit.methods.clear import LocalWindow
from ditkit.seams.attention import AttentionCall, AttentionStrategy, Dense
from ditkit.seams.errors import SeamError
from ditkit.seams.executors import masked_dense
from tiny_models import TINY, output

# Attention modules of the tiny models: (joint, self, cross).
CALLS = {
    "FluxTransformer2DModel": (4, 0, 0),
    "SD3Transformer2DModel": (3, 2, 0),
    "PixArtTransformer2DModel": (0, 3, 3),
    "DiTTransformer2DModel": (0, 3, 0),
    "WanTransformer3DModel": (0, 3, 3),
    "HunyuanVideoTransformer3DModel": (4, 0, 0),
    "CogVideoXTransformer3DModel": (3, 0, 0),
    "LTXVideoTransformer3DModel": (0, 3, 3),
    "QwenImageTransformer2DModel": (3, 0, 0),
    "HunyuanDiT2DModel": (0, 4, 4),
    "DiT": (0, 3, 0),
}
TEXT = {
    "FluxTransformer2DModel": "prefix",
    "SD3Transformer2DModel": "suffix",
    "HunyuanVideoTransformer3DModel": "suffix",
    "CogVideoXTransformer3DModel": "prefix",
    "QwenImageTransformer2DModel": "prefix",
    "DiTTransformer2DModel": "none",
    "DiT": "none",
}
ORIGINAL = F.scaled_dot_product_attention


@dataclass
class Use:
    """A method that only puts a strategy in place."""

    strategy: AttentionStrategy
    claims: ClassVar[frozenset[str]] = frozenset({"attention"})
    hosts: list[Any] = field(default_factory=list)

    def attach(self, host: Any) -> None:
        self.hosts.append(host)
        host.attention.use(self.strategy)


class Spy(Dense):
    """Dense, with a look at each call."""

    def __init__(self, look: Callable[..., None]) -> None:
        self.look = look

    def attend(self, q, k, v, mask, scale, call, plan):
        self.look(q, k, v, mask, call)
        return super().attend(q, k, v, mask, scale, call, plan)


class Failing(Dense):
    def __init__(self, layer: int) -> None:
        self.layer = layer

    def attend(self, q, k, v, mask, scale, call: AttentionCall, plan):
        if call.layer == self.layer:
            raise ArithmeticError("on purpose")
        return super().attend(q, k, v, mask, scale, call, plan)


class Reference(Dense):
    """Another way to compute the same: every call through the masked reference."""

    def attend(self, q, k, v, mask, scale, call, plan):
        return masked_dense(
            q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool) if mask is None else mask
        )


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert F.scaled_dot_product_attention is ORIGINAL


@torch.no_grad()
def run(name: str, model: Any, **options: Any) -> Tensor:
    return output(model(**TINY[name].inputs(**options)))


@pytest.mark.parametrize("name", TINY)
def test_identity_is_bit_equal(name: str):
    model = TINY[name].model()
    expected = [run(name, model, batch=2, size=size) for size in (0, 1)]
    use = Use(Dense())
    with ditkit.apply(model, use, count_flops=False):
        found = [run(name, model, batch=2, size=size) for size in (0, 1)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    counts = use.hosts[0].attention.counts
    joint, own, cross = CALLS[name]
    assert (counts["joint"], counts["self"], counts["cross"]) == (2 * joint, 2 * own, 2 * cross)
    assert counts["other"] == 0
    assert torch.equal(run(name, model, batch=2), expected[0])


@pytest.mark.parametrize("name", TINY)
def test_only_calls_over_the_grid_reach_the_strategy(name: str, monkeypatch: pytest.MonkeyPatch):
    """Cross-attention and text encoders go to the original function, served calls to the strategy alone."""
    model = TINY[name].model()
    original: list[tuple[int, int]] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        original.append((query.shape[-2], key.shape[-2]))
        return ORIGINAL(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    run(name, model, batch=2)
    dense = list(original)
    original.clear()
    served: list[AttentionCall] = []
    with ditkit.apply(model, Use(Spy(lambda q, k, v, mask, call: served.append(call))), count_flops=False):
        spied = run(name, model, batch=2)
    assert sorted(original) == sorted(dense)  # Spy calls the original once for each call it got
    assert len(served) == sum(CALLS[name][:2])
    assert [call.layer for call in served] == list(range(len(served)))
    original.clear()
    with ditkit.apply(model, Use(Reference()), count_flops=False):
        found = run(name, model, batch=2)
    assert len(original) == len(dense) - len(served)
    torch.testing.assert_close(found, spied, atol=1e-5, rtol=1e-5)
    monkeypatch.undo()


def _latent_index(
    name: str, arguments: dict[str, Any], token: tuple[int, int, int], grid: tuple[int, ...]
) -> tuple:
    """Where in the sample one value of a token lies."""
    f, y, x = token
    sample = arguments["hidden_states"]
    if sample.ndim == 3:
        return 0, (f * grid[1] + y) * grid[2] + x, 1
    if sample.ndim == 4:
        return 0, 1, 2 * y, 2 * x
    return (0, f, 1, 2 * y, 2 * x) if name.startswith("CogVideoX") else (0, 1, f, 2 * y, 2 * x)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", TINY)
def test_layout_is_where_the_tokens_are(name: str, size: int):
    """A changed value of one latent moves the key of that token alone, changed text text keys alone."""
    model, keys, layouts = TINY[name].model(), [], []

    def look(q, k, v, mask, call):
        if call.layer == 0:
            keys.append(k)
            layouts.append(call.layout)

    arguments = TINY[name].inputs(size=size)
    with ditkit.apply(model, Use(Spy(look)), count_flops=False), torch.no_grad():
        model(**arguments)
        layout = layouts[0]
        grid = layout.grid
        token = tuple(min(1, size - 1) if axis < 2 else size - 1 for axis, size in enumerate(grid))
        changed = arguments["hidden_states"].clone()
        changed[_latent_index(name, arguments, token, grid)] += 1.0
        model(**{**arguments, "hidden_states": changed})
        if layout.text in ("prefix", "suffix"):
            text = arguments["encoder_hidden_states"] + 0.5
            model(**{**arguments, "encoder_hidden_states": text})
    assert layout.text == TEXT.get(name, "cross")
    assert keys[0].shape[2] == layout.length
    moved = (keys[1] != keys[0]).any(-1).any(1)[0].nonzero().flatten().tolist()
    f, y, x = token
    assert moved == [layout.image_span.start + (f * grid[1] + y) * grid[2] + x]
    if layout.text in ("prefix", "suffix"):
        moved = (keys[2] != keys[0]).any(-1).any(1)[0].nonzero().flatten().tolist()
        assert moved
        assert set(moved) <= set(range(layout.length)[layout.text_span])


def test_image_only_attention_of_a_joint_model_has_no_text():
    name = "SD3Transformer2DModel"
    seen: dict[str, Any] = {}
    with ditkit.apply(
        TINY[name].model(), Use(Spy(lambda q, k, v, m, call: seen.update({call.name: call.layout})))
    ) as r:
        run(name, r.hosts[0].model)
    assert seen["transformer_blocks.0.attn"].text == "suffix"
    assert seen["transformer_blocks.0.attn2"].text == "none"
    assert seen["transformer_blocks.0.attn2"].length == seen["transformer_blocks.0.attn"].image_length


def test_padded_text_reaches_the_strategy_as_a_mask():
    name = "HunyuanVideoTransformer3DModel"
    masks: list[Tensor] = []
    with ditkit.apply(TINY[name].model(), Use(Spy(lambda q, k, v, mask, call: masks.append(mask)))) as r:
        run(name, r.hosts[0].model, batch=2)
    valid = masks[0][:, 0, 0].sum(-1) if masks[0].dtype == torch.bool else (masks[0][:, 0, 0] == 0).sum(-1)
    assert (valid[1] - valid[0]).item() == 2  # the tiny inputs' first prompt has two tokens less


@pytest.mark.parametrize("layer", range(4))
def test_an_exception_leaves_nothing_behind(layer: int):
    name = "FluxTransformer2DModel"
    model = TINY[name].model()
    expected = run(name, model)
    with pytest.raises(ArithmeticError), ditkit.apply(model, Use(Failing(layer))):
        run(name, model)
    assert torch.equal(run(name, model), expected)
    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())
    handle = ditkit.apply(model, Use(Failing(layer)))
    with pytest.raises(ArithmeticError):
        run(name, model)
    # The failure is over: the same forward works once the strategy lets it.
    handle.methods[0].strategy.layer = -1
    assert torch.equal(run(name, model), expected)
    handle.remove()


def test_function_stays_replaced_until_the_last_removal():
    first, second = (TINY[name].model() for name in ("FluxTransformer2DModel", "WanTransformer3DModel"))
    one = ditkit.apply(first, Use(Dense()))
    two = ditkit.apply(second, Use(Dense()))
    assert F.scaled_dot_product_attention is not ORIGINAL
    one.remove()
    assert F.scaled_dot_product_attention is not ORIGINAL
    run("FluxTransformer2DModel", first)
    two.remove()
    assert F.scaled_dot_product_attention is ORIGINAL


def test_state_is_kept_by_layer_and_branch_and_dropped_at_a_new_generation():
    name = "FluxTransformer2DModel"
    seen: list[tuple[int, str, int, int]] = []

    def look(q, k, v, mask, call: AttentionCall):
        call.state["calls"] = call.state.get("calls", 0) + 1
        seen.append((call.layer, call.step.branch, call.step.index, call.state["calls"]))

    with ditkit.apply(TINY[name].model(), Use(Spy(look)), count_flops=False) as r:
        for noise in (0.9, 0.5, 0.9):  # the rise of the timestep is a new generation
            for seed in (0, 1):  # two guidance branches: same latents, other text
                arguments = TINY[name].inputs(noise=noise)
                other = TINY[name].inputs(noise=noise, seed=seed)["encoder_hidden_states"]
                with torch.no_grad():
                    r.hosts[0].model(**{**arguments, "encoder_hidden_states": other})
    layer0 = [entry[1:] for entry in seen if entry[0] == 0]
    assert layer0 == [("0", 0, 1), ("1", 0, 1), ("0", 1, 2), ("1", 1, 2), ("0", 0, 1), ("1", 0, 1)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "HunyuanVideoTransformer3DModel", "WanTransformer3DModel"]
)
def test_gradient_checkpointing(name: str, reentrant: bool):
    """Blocks that run again in the backward pass are sparse too: equal gradients, not the dense ones."""

    def gradients(checkpoint: bool, radius: float) -> list[Tensor]:
        model = TINY[name].model().train().requires_grad_(True)
        if checkpoint:
            model.enable_gradient_checkpointing(
                lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=reentrant)
            )
        arguments = {
            key: value.requires_grad_() if key == "hidden_states" else value
            for key, value in TINY[name].inputs(batch=2).items()
        }
        with ditkit.apply(model, LocalWindow(radius=radius, executor="gather")):
            output(model(**arguments)).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    sparse = gradients(False, 1.5)
    again = gradients(True, 1.5)
    dense = gradients(True, 100.0)
    assert len(sparse) == len(again)
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(sparse, again, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(sparse, dense, strict=True))


@pytest.mark.parametrize("executor", ["dense", "gather"])
def test_compiles_to_one_graph(executor: str):
    name = "FluxTransformer2DModel"
    model = TINY[name].model()
    method = LocalWindow(radius=2.0, executor=executor)
    with ditkit.apply(model, method):
        expected = [run(name, model, noise=noise) for noise in (0.9, 0.5, 0.2)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ditkit.apply(compiled, method):
        found = [run(name, compiled, noise=noise) for noise in (0.9, 0.5, 0.2)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    # Taken off, the compiled model is dense again.
    assert torch.allclose(run(name, compiled), run(name, model), atol=1e-5)
    torch._dynamo.reset()


def test_threads_do_not_mix():
    names = ["FluxTransformer2DModel", "WanTransformer3DModel", "PixArtTransformer2DModel"]
    models = [TINY[name].model() for name in names]
    runs = [ditkit.apply(model, LocalWindow(radius=1.5)) for model in models]
    inputs = [TINY[name].inputs() for name in names]

    @torch.no_grad()
    def once(place: int) -> Tensor:
        return output(models[place](**inputs[place]))

    expected = [once(place) for place in range(len(names))]
    wrong: list[Any] = []

    def work(place: int) -> None:
        try:
            for _ in range(10):
                if not torch.equal(once(place), expected[place]):
                    wrong.append(place)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in runs:
        handle.remove()
    assert not wrong


def test_other_backend_is_refused_before_anything_is_hooked():
    model = TINY["FluxTransformer2DModel"].model()
    model.set_attention_backend("_native_math")
    try:
        with pytest.raises(SeamError, match=r"set_attention_backend\('native'\)"):
            ditkit.apply(model, Use(Dense()))
    finally:
        model.set_attention_backend("native")  # it holds for every model of the process
    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())


def test_processor_without_the_function_is_an_error():
    from diffusers.models.attention_processor import AttnProcessor

    name = "PixArtTransformer2DModel"
    model = TINY[name].model()
    model.transformer_blocks[1].attn1.set_processor(AttnProcessor())
    with (
        ditkit.apply(model, Use(Dense())),
        pytest.raises(SeamError, match=r"transformer_blocks\.1\.attn1 \(AttnProc"),
    ):
        run(name, model)


def test_what_a_processor_adds_is_left_alone():
    """An adapter's own attention inside the module (other lengths) goes to the original function."""
    name = "FluxTransformer2DModel"
    model = TINY[name].model()
    inner = model.transformer_blocks[0].attn.processor
    extra: list[Tensor] = []

    class Adapter:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            extra.append(F.scaled_dot_product_attention(*(torch.ones(1, 2, n, 4) for n in (16, 3, 3))))
            return inner(*args, **kwargs)

    model.transformer_blocks[0].attn.processor = Adapter()
    use = Use(Dense())
    with ditkit.apply(model, use, count_flops=False):
        run(name, model)
    assert torch.equal(extra[0], torch.ones(1, 2, 16, 4))
    assert use.hosts[0].attention.counts == {"joint": 4, "other": 1}


def test_save_pretrained_while_applied(tmp_path):
    name = "FluxTransformer2DModel"
    model = TINY[name].model()
    expected = run(name, model)
    with ditkit.apply(model, LocalWindow(radius=1.5)):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(name, again), expected)
