"""Our names in PEFT's registries, and a method added from outside without a change to shared code."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn
from tuner_cases import begin, images, logits, step, tiny

import peft_cl.tuners.l2p
from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig
from peft_cl.registration import add_peft_type, register_method
from peft_cl.tuners import PromptPoolConfig, PromptPoolModel
from peft_cl.tuners.base.pool import Geometry, PromptPool
from peft_cl.tuners.base.prompts import Injection, Prompts


NAMES = {
    "L2P": L2PConfig,
    "DUALPROMPT": DualPromptConfig,
    "CODAPROMPT": CodaPromptConfig,
    "LINEARPROBE": LinearProbeConfig,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_type_of_ours_is_like_one_of_pefts(name):
    member = getattr(PeftType, name)
    assert member is PeftType(name) is PeftType[name] is add_peft_type(name)
    assert member in list(PeftType) and len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert (member.name, member.value, str(member)) == (name, name, f"PeftType.{name}")
    assert type(member) is type(PeftType.LORA) and repr(member) == repr(PeftType.LORA).replace("LORA", name)
    assert member == name and hash(member) == hash(name) and {name: 1}[member] == 1
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is copy.copy(member) is member
    assert json.dumps(member) == f'"{name}"'
    with pytest.raises(AttributeError):
        setattr(PeftType, name, "other")


@pytest.mark.parametrize("name", NAMES)
def test_methods_are_in_pefts_registries(name):
    config_class = NAMES[name]
    model_class = peft.PEFT_TYPE_TO_TUNER_MAPPING[name]
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[name] is config_class
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] == model_class.prefix == f"{name.lower()}_"
    assert config_class().peft_type is PeftType[name] and issubclass(model_class, PromptPoolModel)
    assert peft.get_peft_config({"peft_type": name}).to_dict() == config_class().to_dict()


def test_registering_again_is_harmless_and_a_taken_name_is_not():
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING["L2P"]
    importlib.reload(peft_cl.tuners.l2p)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["L2P"] is known
    with pytest.raises(KeyError, match="already PEFT method called 'l2p'"):
        register_method("l2p", DualPromptConfig, peft.PEFT_TYPE_TO_TUNER_MAPPING["DUALPROMPT"])
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["L2P"] is known


def test_importing_the_library_registers_the_methods(tmp_path):
    """In a fresh process: PEFT alone does not know the type, and says so; with the import it does."""
    L2PConfig().save_pretrained(tmp_path)
    code = (
        "import sys, peft\n"
        "try:\n    peft.PeftConfig.from_pretrained(sys.argv[1])\n"
        "except KeyError as error:\n    print(error)\n"
        "import peft_cl\n"
        "print(type(peft.PeftConfig.from_pretrained(sys.argv[1])).__name__)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-2:] == ["'L2P'", "L2PConfig"]


def test_a_changed_peft_is_reported(monkeypatch):
    class Plain:
        __members__: ClassVar[dict] = {}

    monkeypatch.setattr("peft_cl.registration.PeftType", Plain)
    with pytest.raises(RuntimeError, match="'L2P'.*must be a string enum.*constraints.txt"):
        add_peft_type("L2P")


# ----------------------------------------------------------------------------------------------- a fourth method


@dataclass
class LastTokensConfig(PromptPoolConfig):
    """A toy: one set of tokens before the last layer, a new one for each task; the latest is used."""

    length: int = field(default=2, metadata={"help": "Tokens of a task."})
    strength: float = field(default=0.1, metadata={"help": "Weight of the tokens' squared length in the loss."})

    method: ClassVar[str] = "Last tokens"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LASTTOKENS
        self._check_positive("length")


class LastTokensPool(PromptPool):
    needs_query = False
    row_axes: ClassVar[dict] = {"tokens": -3}

    def __init__(self, config, geometry):
        super().__init__(config, geometry)
        self.register_buffer("past_tokens", torch.zeros(self.task, config.length, geometry.hidden_size))
        self.tokens = nn.Parameter(torch.randn(1, config.length, geometry.hidden_size))

    @property
    def rows_in_use(self):
        return len(self.rows("tokens"))

    def begin_task(self, index):
        self._grow("tokens", torch.randn_like(self.tokens))

    def select(self, query):
        losses = {"length": self.config.strength * self.tokens.square().sum()} if self.training else {}
        return Prompts({self.geometry.num_layers - 1: Injection(tokens=self.tokens)}, losses)


class LastTokensModel(PromptPoolModel):
    prefix = "lasttokens_"
    pool_class = LastTokensPool


register_method("lasttokens", LastTokensConfig, LastTokensModel)


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_a_fourth_method_needs_no_change_to_shared_code(family, tmp_path):
    model = get_peft_model(tiny(family), LastTokensConfig(length=3))
    for task in range(3):
        begin(model, task)
        loss = step(model)
        terms = model.base_model.head.last_losses
        torch.testing.assert_close(terms["length"] + terms["cross_entropy"], loss)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    facts = PeftConfig.from_pretrained(tmp_path)
    assert type(facts) is LastTokensConfig and facts.rows_in_use == 3 and facts.num_tasks == 3
    loaded = PeftModel.from_pretrained(tiny(family, num_labels=2), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded), expected) and loaded.config.id2label == model.config.id2label
    loaded.begin_task(["one more"])
    assert torch.isfinite(step(loaded)) and loaded.base_model.pool.past_tokens.shape[0] == 3
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded.eval(), images()), logits(tiny(family, num_labels=2)))
    with pytest.raises(ValueError, match="length is 0, but must be a whole number of at least 1"):
        LastTokensConfig(length=0)


def test_what_a_method_must_define_is_said():
    class Empty(PromptPool):
        needs_query = False

    pool = Empty(PromptPoolConfig(), Geometry(hidden_size=4, num_layers=1))
    for call, message in (
        (lambda: pool.rows_in_use, "Empty must say how many of its rows"),
        (lambda: pool(None), r"Empty must define select\(query\)"),
        (lambda: pool.compare({}), "Empty asks for parts but does not define compare"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()
