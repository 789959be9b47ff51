"""Which input is what: by the caller's word, by name, by shape; and every way in which that stays open."""

import pytest
from onnx import TensorProto

from skipstep.errors import InputError, ModelFormatError
from skipstep.export.onnx_roles import FileValue, assign_roles, check_names, choose_output, further_conditions
from skipstep.networks.condition import Condition

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
STATE = FileValue("x", FLOAT, (None, 1, 8, 8))
TIME = FileValue("t", INT, (None,))


def named(name, like):
    return FileValue(name, like.elem_type, like.dims)


def roles(*found, **said):
    chosen, guessed = assign_roles(found, said)
    return {role: each.name for role, each in chosen.items()}, guessed


def test_standard_names_are_no_guess():
    prompts = FileValue("encoder_hidden_states", FLOAT, (None, 5, 6))
    found = (named("sample", STATE), named("timestep", TIME), prompts, named("class_labels", TIME))
    chosen, guessed = roles(*found)
    assert chosen == {name: name for name in ("sample", "timestep", "encoder_hidden_states", "class_labels")}
    assert guessed == []


def test_names_come_before_shapes():
    # Both are integers for each sample; the names tell them apart.
    chosen, guessed = roles(STATE, named("y", TIME), TIME)
    assert chosen == {"sample": "x", "timestep": "t", "class_labels": "y"}
    assert guessed == ["sample is 'x', by its name", "timestep is 't', by its name", "class_labels is 'y', by its name"]


def test_the_only_fitting_shape():
    found = (named("a", STATE), FileValue("b", FLOAT, ()), FileValue("c", FLOAT, (None, None, 6)))
    chosen, guessed = roles(*found)
    assert chosen == {"sample": "a", "timestep": "b", "encoder_hidden_states": "c"}
    assert all("by its shape" in each for each in guessed)
    assert roles(named("a", STATE), FileValue("b", FLOAT, (None, 1, 1, 1)))[0]["timestep"] == "b"


def test_what_the_caller_says_holds():
    assert roles(STATE, named("t", TIME), named("u", TIME), timestep="u", class_labels="t")[0] == {
        "sample": "x",
        "timestep": "u",
        "class_labels": "t",
    }


def test_nothing_like_a_timestep():
    with pytest.raises(ModelFormatError, match="can be 'timestep'; it has x float32") as caught:
        roles(STATE)
    assert "as an input named 'timestep'" in caught.value.remedy
    roles(STATE, named("timestep", TIME))  # The remedy, followed.
    with pytest.raises(ModelFormatError, match="can be 'sample'; it has t int64"):
        roles(TIME)


@pytest.mark.parametrize("names", [("a", "b"), ("sigma", "time")])
def test_several_candidates_and_the_remedy(names):
    found = [STATE, *(FileValue(name, FLOAT, (None,)) for name in names)]
    with pytest.raises(ModelFormatError, match="several inputs that may be 'timestep'") as caught:
        roles(*found)
    said = eval(caught.value.remedy.split("inputs=")[1])
    assert said == {"timestep": names[0]}
    # Then the other is a condition.
    chosen, _ = assign_roles(found, said)
    assert further_conditions(found, chosen, {})[0] == {names[1]: Condition((), null="same")}


def test_other_inputs_are_conditions():
    others = [FileValue("time_ids", FLOAT, (None, 6)), FileValue("kind", INT, (1, 1)), FileValue("flag", BOOL, (None,))]
    chosen, _ = assign_roles([STATE, TIME, *others], {})
    found, guessed = further_conditions([STATE, TIME, *others], chosen, {"kind": Condition((), "int64", 7)})
    assert found == {
        "time_ids": Condition((6,), null="same"),
        "kind": Condition((), "int64", 7),
        "flag": Condition((), "bool", null="same"),
    }
    assert len(guessed) == 2
    assert "'time_ids' is a condition of shape (6,)" in guessed[0]
    for name, condition in (("other", Condition()), ("kind", Condition((1, 8, 8), concat_to_state=True))):
        with pytest.raises(InputError, match="also reads time_ids, kind, flag"):
            further_conditions([STATE, TIME, *others], chosen, {name: condition})
    open_shape = FileValue("mask", FLOAT, (None, None))
    with pytest.raises(ModelFormatError, match=r"also reads mask float32 \[\?, \?\]") as caught:
        further_conditions([open_shape], {}, {})
    assert "conditions={'mask': Condition(shape)}" in caught.value.remedy
    assert further_conditions([open_shape], {}, {"mask": Condition((5,))})[0] == {"mask": Condition((5,))}


@pytest.mark.parametrize("said", [{"timestep": "nothing"}, {"timestep": "x"}, {"sample": "t"}])
def test_names_that_do_not_fit(said):
    with pytest.raises(InputError, match="inputs="):
        roles(STATE, TIME, **said)


@pytest.mark.parametrize("wrong", ["x", 3, ["sample"], {"state": "x"}, {3: "x"}, {"sample": 3}])
def test_what_is_no_mapping(wrong):
    with pytest.raises(InputError, match="inputs="):
        check_names(wrong)


def test_the_output():
    hidden, out = FileValue("hidden", FLOAT, (None, 16)), FileValue("out_sample", FLOAT, (None, 1, 8, 8))
    other = named("other", out)
    assert choose_output([named("any", hidden)], None, STATE).name == "any"
    assert choose_output([hidden, out], None, STATE) == out
    assert choose_output([hidden, other], None, STATE) == other
    assert choose_output([out, other], "other", STATE) == other
    with pytest.raises(ModelFormatError, match="several outputs") as caught:
        choose_output([other, named("more", out)], None, STATE)
    said = check_names(eval(caught.value.remedy.split("inputs=")[1]))
    assert choose_output([other, named("more", out)], said["out_sample"], STATE) == other
    with pytest.raises(InputError, match="one of them"):
        choose_output([out], "nothing", STATE)
