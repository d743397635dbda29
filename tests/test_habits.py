"""What people expect of a repository: one version everywhere, a workflow that calls tiers that exist."""

import ast
import re
import tomllib
from pathlib import Path

import yaml

import sslx

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == sslx.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == sslx.__version__
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == sslx.__version__


def test_the_workflow_calls_tiers_that_there_are() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    jobs = yaml.safe_load(workflow)["jobs"]
    tiers = {word for line in re.findall(r"\.ci/run ([a-z ]+)", workflow) for word in line.split()}
    tiers |= set(jobs["night"]["strategy"]["matrix"]["tier"])
    known = set(re.findall(r"^([a-z]+)\(\) ", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)) - {"timed"}
    assert tiers == known
    assert {"lint", "fast", "slow", "slurm", "oldest", "isa", "soak", "faults"} == known


def test_issue_forms_ask_for_the_doctor() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    required = [field["id"] for field in form["body"] if field.get("validations", {}).get("required")]
    assert "doctor" in required


def test_hooks_run_what_is_installed() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    local = [hook["entry"].split()[0] for repo in hooks if repo["repo"] == "local" for hook in repo["hooks"]]
    assert set(local) == {".venv/bin/ruff"}


def test_what_is_left_to_the_night_exists() -> None:
    tree = ast.parse((ROOT / "tests" / "tiers.py").read_text())
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    named = {str(value) for value in constants if re.fullmatch(r"test_\w+", str(value))}
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 50
    assert named <= defined
