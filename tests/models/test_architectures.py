"""What every architecture must satisfy; the cases are in `architectures`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from architectures import CASES, Case, Published, inputs
from ditkit import models
from ditkit.models.convert import convert
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.pipelines.denoising import scheduler_for

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize(
    "published",
    [published for case in CASES.values() for published in case.published],
    ids=lambda published: f"{published.name}-{published.side}",
)
def test_published_parameters_and_multiply_adds(published: Published) -> None:
    with torch.device("meta"):
        model = models.create(published.name, **published.config).eval()
        arguments = (
            torch.empty(1, 4, published.side, published.side),
            torch.empty(1, dtype=torch.long),
            torch.empty(1, dtype=torch.long),
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == published.parameters
    if published.multiply_adds is None:
        return
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments)
    # Half of the table's last decimal is more than a percent of nothing here.
    assert counter.get_total_flops() / 2e9 == pytest.approx(published.multiply_adds, rel=0.01)


@every_case
def test_shapes(case: Case) -> None:
    model = case.model()
    for size in case.sizes:
        latent, times, labels = inputs(model, 3, size)
        with torch.no_grad():
            assert model(latent, times, labels).sample.shape == (3, model.out_channels, *size)


@every_case
def test_every_parameter_gets_a_gradient(case: Case) -> None:
    model = case.model().train()
    latent, times, _ = inputs(model, 6)
    output = model(latent, times, torch.arange(6) % 6)
    sum(part.square().mean() for part in output.get("stages", [output.sample])).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(dict(model.named_parameters())) - set(trained) == set(case.fixed)
    assert not [name for name, p in trained.items() if p.grad is None or p.grad.abs().max() == 0]


@every_case
@torch.no_grad()
def test_samples_of_a_batch_are_independent(case: Case) -> None:
    model = case.model()
    batch = inputs(model, 3)
    together = model(*batch).sample
    for i in range(3):
        alone = model(*(value[i : i + 1] for value in batch)).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@every_case
@torch.no_grad()
def test_forms_of_the_call(case: Case) -> None:
    model = case.model()
    latent, times, labels = inputs(model)
    expected = model(latent, times, labels).sample
    assert torch.equal(model(latent, times, labels, return_dict=False)[0], expected)
    same = torch.full((2,), 7)
    assert torch.equal(model(latent, same[0], labels).sample, model(latent, same, labels).sample)
    null = model(latent, times, torch.full((2,), model.y_embedder.null_label)).sample
    assert torch.equal(model(latent, times).sample, null)
    assert torch.equal(model(latent, times, labels, force_drop_ids=torch.ones(2)).sample, null)
    assert not torch.equal(expected, null)


@every_case
@torch.no_grad()
def test_guidance(case: Case) -> None:
    model = case.model()
    latent, times, labels = inputs(model)
    both, again = latent.repeat(2, 1, 1, 1), times.repeat(2)
    pairs = torch.cat([labels, torch.full((2,), model.y_embedder.null_label)])
    conditional, unconditional = model(both, again, pairs).sample.chunk(2)
    for asked, guided in ((None, model.authors_guidance), ("all", 4), (2, 2)):
        guided = model.in_channels if guided == "all" else guided
        first, second = model.forward_with_cfg(both, again, pairs, 3.0, asked).chunk(2)
        expected = unconditional + 3.0 * (conditional - unconditional)
        torch.testing.assert_close(first[:, :guided], expected[:, :guided], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(second[:, guided:], unconditional[:, guided:])


@every_case
@torch.no_grad()
def test_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    batch = inputs(model)
    assert torch.equal(loaded(*batch).sample, model(*batch).sample)
    half = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    latent, times, labels = batch
    output = half(latent.bfloat16(), times, labels).sample
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@every_case
@torch.no_grad()
def test_draws_through_the_pipeline(case: Case, tmp_path: Path) -> None:
    model = case.model()
    flow = model.unfit_for("gaussian") is not None
    pipe = ClassConditionalPipeline(
        model, scheduler_for("flow", False, clip=False) if flow else DDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    options = {
        "class_labels": [1, 2],
        "guidance_scale": 2.0,
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    drawn = pipe(**options, generator=torch.Generator().manual_seed(0)).images
    assert drawn.shape == (2, 4, *model.latent_size) and drawn.isfinite().all()
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**options, generator=torch.Generator().manual_seed(0)).images, drawn)


@every_case
def test_gradient_checkpointing_changes_nothing(case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = case.model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)
        model(*inputs(model)).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-6)


@every_case
def test_wrong_inputs_are_explained(case: Case) -> None:
    model = case.model()
    latent, times, labels = inputs(model)
    for arguments, message in (
        ((latent[:, :3], times, labels), "expected \\(B, 4, H, W\\)"),
        ((latent, torch.zeros(3), labels), "timestep has shape"),
        ((latent, times, torch.zeros(3, dtype=torch.long)), "class_labels has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    if model.side_multiple > 1:
        with pytest.raises(ValueError, match=f"multiple of {model.side_multiple}"):
            model(latent[..., :-1], times, labels)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.converts], ids=lambda c: c.name)
def test_authors_checkpoint_is_converted(case: Case, tmp_path: Path) -> None:
    """From a file under the authors' names to a folder: equal weights, dimensions read from the shapes."""
    model: Any = case.model()
    state = {name: value.contiguous() for name, value in case.authors(model.state_dict()).items()}
    save_file(state, tmp_path / "authors.safetensors")
    done = convert(tmp_path / "authors.safetensors", case.name, tmp_path / "out", config=case.told)
    loaded = type(model).from_pretrained(done.output)
    assert dict(loaded.state_dict()).keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    for name, value in case.tiny.items():
        if name != "input_size":
            assert loaded.config[name] == (list(value) if isinstance(value, tuple) else value), name
