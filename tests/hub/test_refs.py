"""What names a repository and its state, and what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import RefError
from adapterhub.hub.refs import Ref, looks_like_path, parse_ref

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_WORD = st.text("abcXYZ019_", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("ada/orders", "ada/orders", None),
        ("ada/orders@1.2.0", "ada/orders", "v1.2.0"),
        ("ada/orders@v1.2.0", "ada/orders", "v1.2.0"),
        ("ada/orders@1.2.0-rc.1", "ada/orders", "v1.2.0-rc.1"),
        ("ada/orders@main", "ada/orders", "main"),
        ("ada/orders@1.2", "ada/orders", "1.2"),
        ("ada/orders@feature/x", "ada/orders", "feature/x"),
        ("ada/orders@refs/pr/7", "ada/orders", "refs/pr/7"),
        ("ada/orders@refs/convert/parquet", "ada/orders", "refs/convert/parquet"),
        (f"ada/orders@{COMMIT}", "ada/orders", COMMIT),
        ("HuggingFaceTB/SmolLM2-135M_x.y", "HuggingFaceTB/SmolLM2-135M_x.y", None),
    ],
)
def test_reads_what_names_a_state(text: str, repo: str, revision: str | None) -> None:
    assert parse_ref(text) == Ref(repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "", "orders", "/ada/orders", "ada/orders/", "ada//orders", "a/b/c", "../orders", "ada/..",
        "ada/a..b", "ada/a--b", "ada/orders.git", "ada/.orders", "-ada/orders", "ada/or ders",
        "ada/orders\n", "ada\\orders", "ada/orders@", "ada/orders@@v1.0.0", "ada/orders@a@b",
        "ada/orders@../x", "ada/orders@a..b", "ada/orders@-x", "ada/orders@/x", "ada/orders@x/",
        "ada/orders@x//y", "ada/orders@x.lock", "ada/orders@x/.y", "ada/orders@ v1",
        "ada/orders@a b", "ada/orders@x^", "ada/orders@x~1", "ada/orders@x:y", "ada/orders@*",
        "ada/orders@refs/heads/main", "ada/orders@refs/pr/0", "ada/örders", "ada/orders@v1.0.0\x00",
        "https://huggingface.co/ada/orders", "C:/orders", "~/orders", f"{'a' * 60}/{'b' * 60}",
    ],
)  # fmt: skip
def test_refuses_what_names_nothing(text: str) -> None:
    with pytest.raises(RefError) as error:
        parse_ref(text)
    assert "owner/name" in error.value.fix


@given(owner=_WORD, name=_WORD, revision=st.none() | _WORD)
def test_what_is_read_is_written_the_same(owner: str, name: str, revision: str | None) -> None:
    ref = Ref(f"{owner}/{name}", revision)
    assert parse_ref(str(ref)) == ref


@given(st.tuples(*[st.integers(0, 999)] * 3), st.sampled_from(["", "-a.1", "-b.0", "-rc.12"]))
def test_a_version_names_its_tag_with_or_without_v(numbers: tuple[int, int, int], pre: str) -> None:
    version = ".".join(map(str, numbers)) + pre
    assert parse_ref(f"a/b@{version}") == parse_ref(f"a/b@v{version}") == Ref("a/b", f"v{version}")
    assert parse_ref(f"a/b@{version}").version == version


@given(st.text())
def test_whatever_is_accepted_stays_inside_the_cache(text: str) -> None:
    try:
        ref = parse_ref(text)
    except RefError:
        return
    for part in [*ref.repo.split("/"), *(ref.revision or "x").split("/")]:
        assert part not in ("", ".", "..")
        assert part.isascii()
        assert part.isprintable()
    assert ref.repo.count("/") == 1


@given(_WORD, _WORD, st.text(" .-@/\\:*?\x00~^", min_size=1, max_size=4))
def test_hostile_characters_never_make_a_revision_that_git_refuses(owner: str, name: str, tail: str) -> None:
    try:
        revision = parse_ref(f"{owner}/{name}@x{tail}").revision
    except RefError:
        return
    assert revision is not None
    assert not set(revision) & set(" \\:*?\x00~^@")
    assert ".." not in revision
    assert "//" not in revision
    assert not revision.endswith((".", "/", ".lock"))


@pytest.mark.parametrize(
    "text", ["./x", "../a/b", "/tmp/x", "~/x", "~ada", ".", "a/b/c", "a/b/", "runs/", "a/b/c@1.0.0"]
)
def test_what_can_only_be_a_path(text: str) -> None:
    assert looks_like_path(text)


@pytest.mark.parametrize("text", ["ada/orders", "ada/orders@1.2.0", "ada/orders@refs/pr/7", "orders", ""])
def test_what_a_hub_may_hold(text: str) -> None:
    assert not looks_like_path(text)
