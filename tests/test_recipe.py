"""Rules and patterns."""

from pathlib import Path
from typing import Any

import pytest

from streamquant.errors import RequestError
from streamquant.recipe import Matcher, make_recipe

ROLES = {
    "lm_head": "lm_head",
    "model.layers.0.mlp.up_proj": "mlp",
    "model.layers.0.self_attn.q_proj": "attention",
    "model.layers.10.mlp.up_proj": "mlp",
    "mlp.odd": None,
}


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("lm_head", [0]),
        ("model.layers.0", [1, 2]),  # a module stands for what is below it
        ("model.layers.1", []),  # and not for what its name merely begins
        ("up_proj", []),
        ("mlp", [1, 3]),  # a role, and no name
        ("attention", [2]),
        ("experts", []),
        ("*.up_proj", [1, 3]),
        ("*.layers.?", [1, 2]),
        ("*.mlp", [1, 3]),
        ("*layers.[!0]*", [3]),
        ("re:.*q_proj", [2]),
        ("re:layers", []),  # from the start, as compressed-tensors does
        ("re:model", [1, 2, 3]),  # not to the end
        ("re:.*(q|k)_proj$", [2]),
    ],
)
def test_patterns_are_roles_names_globs_or_expressions(pattern: str, matched: list[int]) -> None:
    matcher = Matcher([pattern])
    assert [index for index, (name, role) in enumerate(ROLES.items()) if matcher.first(name, role) == 0] == matched
    assert matcher.matches_any(ROLES) == bool(matched)


def test_the_first_pattern_that_matches_decides_whatever_its_kind() -> None:
    matcher = Matcher(["re:.*up_proj", "model.layers.0", "lm_head", "*", "re:.*q_(proj)", "mlp"])
    assert [matcher.first(name, role) for name, role in ROLES.items()] == [2, 0, 1, 0, 3]


def test_a_pattern_behind_another_counts_as_matching() -> None:
    assert Matcher(["*", "lm_head", "*.q_proj", "nothing", "re:.*none", "experts"]).unmatched(ROLES, used=[0]) == [3, 4, 5]


@pytest.mark.parametrize("pattern", ["re:(", "re:(a)\\1", "", "re:*x"])
def test_a_pattern_that_is_no_expression_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(RequestError, match="pattern"):
        Matcher(["*.fine", pattern])


def test_rules_come_in_the_order_ignore_file_scheme(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        """
        ignore = ["*.layers.0.*"]
        include = ["lm_head"]
        [[rule]]
        match = ["*.experts.*", "re:.*shared"]
        scheme = "NVFP4A16"
        observer = "mse"
        [[rule]]
        match = "*.down_proj"
        keep = true
        """
    )
    recipe = make_recipe(scheme="W4A16", recipe=file, ignore=["lm_head.x"], include=["y"], group_size=32, format="compressed-tensors")
    assert [(rule.pattern, rule.scheme.title if rule.scheme else None) for rule in recipe.rules] == [
        ("lm_head.x", None),
        ("*.layers.0.*", None),
        ("*.experts.*", "NVFP4A16 (mse)"),
        ("re:.*shared", "NVFP4A16 (mse)"),
        ("*.down_proj", None),
        ("*", "W4A16"),
    ]
    assert recipe.include == ("y", "lm_head")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "unknown key 'x'"),
        ("[[rule]]\nmatch = '*'", "either a scheme or keep"),
        ("[[rule]]\nmatch = '*'\nscheme = 'W4A16'\nkeep = true", "either a scheme or keep"),
        ("[[rule]]\nmatch = '*'\nkeep = false", "can only be true"),
        ("[[rule]]\nmatch = '*'\nkeep = true\nobserver = 'mse'", "goes with no other setting"),
        ("[[rule]]\nscheme = 'W4A16'", "match must be a pattern"),
        ("[[rule]]\nmatch = [1]\nscheme = 'W4A16'", "match must be a pattern"),
        ("[[rule]]\nmatch = '*'\nscheme = 'W4A16'\ngroup = 3", "unknown key 'group'"),
        ("[[rule]]\nmatch = '*'\nscheme = 'W4A16'\ngroup_size = '64'", "group_size must be of type int"),
        ("[[rule]]\nmatch = '*'\nscheme = 4", "scheme must be a name"),
        ("[[rule]]\nmatch = '*'\nscheme = 'W9A16'", "unknown scheme 'W9A16'"),
        ("rule = 3", "rule"),
        ("ignore = 3", "ignore must be a pattern"),
        ("= 3", "not valid TOML"),
        ("scheme = 3", "scheme"),
    ],
)
def test_a_faulty_recipe_file_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(RequestError, match=said) as error:
        make_recipe(recipe=file)
    assert "recipe.toml" in str(error.value) or "unknown scheme" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "nothing to do"),
        ({"recipe": "missing.toml"}, "cannot read recipe missing.toml"),
        ({"group_size": 64}, "--group-size needs --scheme"),
        ({"scheme": "FP8"}, "without data use FP8_DYNAMIC"),
        ({"scheme": "NVFP4"}, "without data use NVFP4A16"),
        ({"scheme": "FP8_DYNAMIC", "group_size": 64}, "FP8_DYNAMIC has no group size"),
        ({"scheme": "W4AFP8", "group_size": 64}, "W4AFP8 has no group size"),
        ({"scheme": "W4A16", "observer": "best"}, "unknown observer"),
        ({"scheme": "W4A16", "scale_dtype": "float32"}, "W4A16 has no scale dtype"),
        ({"scheme": "W4A16", "format": "fp8"}, "format fp8 stores FP8_BLOCK"),
    ],
)
def test_an_impossible_wish_names_what_is_wrong(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make_recipe(**arguments)
