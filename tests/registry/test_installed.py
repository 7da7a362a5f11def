"""Plug-ins of installed packages, made in a folder: a distribution is a dist-info with an entry_points.txt."""

import os
import subprocess
import sys
import textwrap

import pytest

VOTE = '''
from fdl.methods.fedavg import FedAvg

class MajorityVote(FedAvg):
    """The label that most clients give."""

    name = "majority_vote"

    def __init__(self, ties: str = "first"):
        super().__init__()
'''
CODEC = '''
from fdl.comm.stages.base import Stage

class Halves(Stage):
    """Half of everything."""

def helper():
    raise RuntimeError("nobody may import this to list it")

raise RuntimeError("nobody may import this to list it")
'''


def distribution(folder, name, points, **files):
    """Write what pip would have installed."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[fdl.plugins]", *lines]) + "\n")
    for stem, text in files.items():
        (folder / f"{stem}.py").write_text(text)


@pytest.fixture
def site(tmp_path):
    return tmp_path / "site"


def fdl(site, *words):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", "fdl", *words], capture_output=True, text=True, env=env)


def test_classes_of_installed_packages_have_short_names_and_are_listed(site):
    distribution(
        site, "acme-fl", {"all": "acme_methods", "halves": "acme_codec:Halves"}, acme_methods=VOTE, acme_codec=CODEC
    )
    listed = fdl(site, "list")
    assert listed.returncode == 0 and "not offered" not in listed.stdout
    (vote,) = [line for line in listed.stdout.splitlines() if "majority_vote" in line]
    assert "The label that most clients give." in vote and vote.endswith("acme_methods.py:4 (acme-fl)")
    assert "Half of everything." in fdl(site, "list", "codecs").stdout
    shown = fdl(site, "list", "method", "majority_vote").stdout
    assert "(acme-fl)" in shown and "ties" in shown
    code = """
        import sys
        from fdl.recipe import from_mapping
        from fdl.errors import RecipeError
        tree = {"data": "digits", "student": "mlp"}
        assert from_mapping(tree | {"method": "majority_vote"}).method.target == "majority_vote"
        try:
            from_mapping(tree | {"method": {"target": "majority_vote", "args": {"tie": 1}}})
        except RecipeError as error:
            print(error)
        assert "torch" not in sys.modules
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    checked = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, check=True
    )
    assert "takes no 'tie'; did you mean 'ties'?" in checked.stdout


def test_a_name_that_two_claim_is_an_error_that_names_both(site):
    distribution(site, "acme-fl", {"all": "acme_methods"}, acme_methods=VOTE)
    distribution(site, "other-fl", {"all": "other_methods"}, other_methods=VOTE)
    distribution(site, "third-fl", {"all": "third"}, third=VOTE.replace('"majority_vote"', '"fedavg"'))
    listed = fdl(site, "list").stdout.partition("not offered\n")[2]
    both = "acme-fl (acme_methods.MajorityVote) and other-fl (other_methods.MajorityVote) claim it"
    ours = "fdl (fdl.methods.fedavg.FedAvg) and third-fl (third.MajorityVote) claim it"
    assert both in listed and ours in listed
    for name, claims in (("majority_vote", both), ("fedavg", ours)):
        recipe = site / "recipe.yaml"
        recipe.write_text(f"method: {name}\ndata: digits\nstudent: mlp\n")
        ended = fdl(site, "check", "--recipe", str(recipe))
        assert ended.returncode == 2 and claims in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    ("value", "text", "reason"),
    [
        ("nothing_here", None, "there is no module nothing_here"),
        ("broken:Vote", "class Vote(\n", "broken.py cannot be read: '(' was never closed"),
        ("broken:Vot", VOTE, "there is no broken.Vot"),
        ("broken:MajorityVote", "class MajorityVote:\n    pass\n", "broken.MajorityVote derives from no base class"),
        ("broken", "x = 1\n", "it is no class, and no module with classes that have a name"),
    ],
)
def test_a_broken_package_is_reported_and_nothing_else_suffers(site, value, text, reason):
    distribution(site, "broken-fl", {"vote": value}, **({} if text is None else {"broken": text}))
    listed = fdl(site, "list")
    assert listed.returncode == 0 and "Traceback" not in listed.stderr and "fedavg" in listed.stdout
    assert f"broken-fl: entry point vote = {value}: " in listed.stdout and reason in listed.stdout
