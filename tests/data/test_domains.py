from pathlib import Path

import pytest

from mmm4rec_cli.data import domains
from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.workspace import Workspace


def test_there_are_29_categories_each_under_one_plain_name():
    assert len(domains.CATEGORIES) == 29 == len(set(domains.CATEGORIES.values()))
    assert all(name.isalpha() and name.islower() and name.isascii() for name in domains.CATEGORIES)


def test_mix_and_downstream_domains_are_categories():
    assert domains.mix("fhckm") == ("food", "home", "cds", "kindle", "movies")
    assert {*domains.mix("fhckm"), *domains.DOWNSTREAM} <= set(domains.CATEGORIES)
    assert domains.members("fhckm") == domains.mix("fhckm")
    assert domains.members("pantry") == ("pantry",)
    assert not set(domains.MIXES) & set(domains.CATEGORIES)


@pytest.mark.parametrize(
    ("name", "close"),
    [("scientfic", "scientific"), ("Magazine_Subscriptions", "magazine"), ("OFFICE", "office"), ("fhkcm", "fhckm")],
)
def test_unknown_domain_names_the_close_one(name, close):
    with pytest.raises(UsageError, match=name) as caught:
        domains.check_domain(Workspace(Path("nowhere")), name)
    assert close in caught.value.hint


def test_unknown_domain_without_a_close_one_names_all():
    with pytest.raises(UsageError) as caught:
        domains.category("qqqqqq")
    assert "appliances" in caught.value.hint
    assert "toys" in caught.value.hint


def test_unknown_mix_names_the_mixes():
    with pytest.raises(UsageError, match="abcde") as caught:
        domains.mix("abcde")
    assert "fhckm" in caught.value.hint


@pytest.mark.parametrize("name", ["shop", "my-shop_2", "007", "_x"])
def test_own_names_of_letters_digits_dash_underscore_pass(name):
    assert domains.own_domain(name) == name


@pytest.mark.parametrize("name", ["", "-x", "a/b", "..", "a b", "käse", "a\n"])
def test_other_own_names_are_refused(name):
    with pytest.raises(UsageError, match="domain name"):
        domains.own_domain(name)


def test_own_domain_is_known_once_it_has_a_manifest(tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(UsageError):
        domains.check_domain(workspace, "shop")
    workspace.processed("shop").mkdir(parents=True)
    (workspace.processed("shop") / "manifest.json").write_text("{}")
    assert domains.check_domain(workspace, "shop") == "shop"
    assert domains.own_domains(workspace) == ["shop"]
