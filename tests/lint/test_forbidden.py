"""The project's own code holds nothing of what `forbidden` names, and `forbidden` sees what it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lint.forbidden import find, find_paths

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "scripts", "benchmarks", "tests")
CODE = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
TEXTS = [
    path
    for pattern in ("*.md", "*.toml", "*.txt", "Makefile", ".ci/*", "configs/**/*.yaml", "docs/**/*.md")
    for path in ROOT.glob(pattern)
]
ELSEWHERE = "/" + "work/checkout/weights.pt"

BAD = [
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.load(path, weights_only=trusted)",
    "import pickle",
    "from pickle import loads",
    "import joblib.numpy_pickle",
    "import dill as d",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.FullLoader)",
    "yaml.unsafe_load(text)",
    "from yaml import load",
    "eval(text)",
    "exec(text)",
    "os.system(text)",
    "subprocess.run(text, shell=True)",
    "np.load(path, allow_pickle=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=flag)",
    "model.cuda()",
    "model.blocks[0].cuda(1)",
    "torch.zeros(3, dtype=torch.float64, device=device)",
    "x.to(device, torch.float64)",
    "x.to(device=x.device, dtype=torch.double)",
    "torch.set_default_dtype(torch.float64)",
    f"open({ELSEWHERE!r})",
    f"# weights are in {ELSEWHERE}",
]
GOOD = [
    "torch.load(path, weights_only=True)",
    "yaml.safe_load(text)",
    "model.eval()",
    "json.load(stream)",
    "torch.cuda.synchronize()",
    "np.load(path, allow_pickle=False)",
    "torch.linspace(0, 1, 5, dtype=torch.float64)",
    "torch.zeros(3, dtype=torch.float64, device='cpu')",
    "x.to('cpu', torch.float64)",
    "x.to(torch.float64)",
    "url = 'https://arxiv.org/abs/2503.06923'",
    "key = 'model/data/root'",
]


def test_there_is_code_to_look_at() -> None:
    assert len(CODE) > 30
    assert len(TEXTS) > 3


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code(path: Path) -> None:
    assert find(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts(path: Path) -> None:
    assert find_paths(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("snippet", BAD)
def test_bad_snippets_are_found(snippet: str) -> None:
    findings = find(f"x = 1\n{snippet}\n")
    assert len(findings) == 1
    assert findings[0].startswith("2: ")


@pytest.mark.parametrize("snippet", GOOD)
def test_good_snippets_pass(snippet: str) -> None:
    assert find(snippet) == []
