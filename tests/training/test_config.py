import pytest
import yaml

from ditkit.analysis.compare import config as comparison
from ditkit.training.config import ConfigError, load


def test_one_run_is_one_stage(training_file):
    file = load(training_file())
    assert [stage.name for stage in file.stages] == ["tiny"]
    assert file.stages[0].optimizer.lr == 1e-3


def test_bundled_configurations_are_valid(request):
    folder = request.config.rootpath / "configs"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for path in files:
        (comparison.load if path.name.startswith("compare_") else load)(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 3}, ["stepz", "no such key"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"optimizer": {"lr": -1}}, ["optimizer.lr", "-1"]),
        ({"schedule": {"kind": "square"}}, ["schedule.kind", "square"]),
        ({"batch_size": 10, "accumulation": 4}, ["batch_size=10", "accumulation=4"]),
        ({"data": {"kind": "folder"}}, ["data", "path"]),
    ],
)
def test_bad_keys_are_named(training_file, changes, words):
    with pytest.raises(ConfigError) as error:
        load(training_file(**changes))
    assert all(word in str(error.value) for word in words), error.value


def test_overrides(training_file):
    file = load(training_file(), ["steps=9", "optimizer.betas=[0.8, 0.9]", "tiny.seed=5", "output=elsewhere"])
    stage = file.stages[0]
    assert (stage.steps, stage.optimizer.betas, stage.seed, str(file.output)) == (
        9,
        (0.8, 0.9),
        5,
        "elsewhere",
    )


def test_no_without_quotes_is_a_precision(training_file):
    assert load(training_file(), ["precision=no"]).stages[0].precision == "no"
    with pytest.raises(ConfigError, match="precision"):
        load(training_file(), ["precision=yes"])


@pytest.mark.parametrize("override", ["steps", "=3", "tiny=3"])
def test_bad_overrides(training_file, override):
    with pytest.raises(ConfigError):
        load(training_file(), [override])


def test_overrides_reach_stages_by_name_and_number(tmp_path, training_file):
    run = yaml.safe_load(training_file().read_text())
    output = run.pop("output")
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"output": output, "stages": [run, {**run, "name": "second"}]}))
    file = load(path, ["second.steps=11", "stages.0.steps=12"])
    assert [stage.steps for stage in file.stages] == [12, 11]
    with pytest.raises(ConfigError, match="stage name"):
        load(path, ["steps=3"])


def test_missing_file_and_bad_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(broken)


def test_yaml_can_not_make_objects(tmp_path):
    canary = tmp_path / "canary"
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"!!python/object/apply:os.mkdir ['{canary}']")
    with pytest.raises(ConfigError):
        load(evil)
    assert not canary.exists()
