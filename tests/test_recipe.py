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
    ("line", "rules"),
    [
        ("W4A16", [("*", "W4A16")]),
        ("experts=NVFP4A16,attention=FP8_BLOCK", [("experts", "NVFP4A16"), ("attention", "FP8_BLOCK")]),
        (" fp8_dynamic , *.layers.0 = keep, mlp=W4A16", [("*.layers.0", None), ("mlp", "W4A16"), ("*", "FP8_DYNAMIC")]),
        ("re:.*(?=x)y=W4A16", [("re:.*(?=x)y", "W4A16")]),
    ],
)
def test_a_line_gives_patterns_their_schemes_and_the_bare_one_to_the_rest(line: str, rules: list[tuple[str, str | None]]) -> None:
    recipe = make_recipe(scheme=line)
    assert [(rule.pattern, rule.scheme.preset if rule.scheme else None) for rule in recipe.rules] == rules
    assert [rule.pattern for rule in recipe.rules if rule.is_default] == ["*"] * (rules[-1][0] == "*")
    assert recipe.include == ()


def test_settings_go_to_every_scheme_of_a_line() -> None:
    recipe = make_recipe(scheme="experts=W4A16,W8A16", observer="mse", group_size=32)
    assert [scheme.weights_config["group_size"] for scheme in recipe.schemes] == [32, 32]
    assert [scheme.observer for scheme in recipe.schemes] == ["mse", "mse"]


def test_a_scheme_for_a_role_that_is_kept_by_default_includes_it_after_what_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[[rule]]\nmatch = ['mtp', 'attention']\nscheme = 'W8A16'\n[[rule]]\nmatch = 'routers'\nkeep = true")
    recipe = make_recipe(scheme="lm_head=W8A16,mlp=W4A16", recipe=file, include=["lm_head", "*.patch_embed"])
    assert recipe.include == ("*.patch_embed", "lm_head", "mtp")


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
        ({"scheme": "FP8_DYNAMIC", "group_size": 64}, "FP8_DYNAMIC has no group size"),
        ({"scheme": "W4AFP8", "group_size": 64}, "W4AFP8 has no group size"),
        ({"scheme": "W4A16", "observer": "best"}, "unknown observer"),
        ({"scheme": "W4A16", "scale_dtype": "float32"}, "W4A16 has no scale dtype"),
        ({"scheme": "W4A16", "format": "fp8"}, "format fp8 stores FP8_BLOCK"),
        ({"scheme": "experts=W4A16,"}, "'' in 'experts=W4A16,' is neither PATTERN=SCHEME, PATTERN=keep nor SCHEME"),
        ({"scheme": "experts="}, "'experts=' in 'experts=' is neither"),
        ({"scheme": "=W4A16"}, "'=W4A16' in '=W4A16' is neither"),
        ({"scheme": "W4A16,W8A16"}, "'W4A16,W8A16' has two schemes for the rest; give one of them a pattern: PATTERN=W8A16"),
        ({"scheme": "mlp=W4A16,mlp=keep"}, "'mlp' is in 'mlp=W4A16,mlp=keep' twice"),
        ({"scheme": "experts=W5"}, "unknown scheme 'W5'"),
        ({"scheme": "experts=keep"}, "nothing to do"),
        ({"scheme": "experts=NVFP4A16,W4A16", "group_size": 64}, "NVFP4A16 has no group size"),
    ],
)
def test_an_impossible_wish_names_what_is_wrong(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make_recipe(**arguments)
