"""Proof that the files are the trained policy: distances, tokens, chats that stop, budgets that are kept. Writes nothing itself.

Everything is measured on answers the trained policy (base and adapter, as in training) gives to questions of the run's own task. One
model is in memory at a time; of the others only logits are kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch

from sbtiny.budget.metrics import Sample, summarise
from sbtiny.budget.protocol import prefill
from sbtiny.evaluation.evaluate import Verify, answer, judge
from sbtiny.export.compare import distance, gathered, in_float32, kl, scorer, texts
from sbtiny.export.plan import Plan
from sbtiny.export.strings import STRINGS
from sbtiny.export.transcripts import chat, opened
from sbtiny.models.from_gguf import lost, read
from sbtiny.models.load import load, prompt_ids
from sbtiny.rollout import llama_cpp
from sbtiny.rollout.episode import Episode
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.sources import Question

CHATS = 20
RATIO = 20  # how much nearer to the policy than to its base the merged weights must be
# Least share of clear positions (compare.LEAD) at which first choices must agree: what is left of the trained policy's decisions.
AGREE = {"f32": 0.999, "f16": 0.999, "bf16": 0.99, "q8_0": 0.99, "q6_k": 0.98}
AGREE_LOW = 0.9  # for 4 and 5 bits
SLACK = 0.05  # what format and stopping may lose to quantisation


class Check:
    """Measures one export against the trained policy; `result` is what export.json says, `failures` why it must not be used.

    `composes`: the tokenizer brings text into composed form. llama.cpp does not, so it is asked with text that is in it, and the README
    beside the file says that its text must be.
    """

    def __init__(self, plan: Plan, questions: Sequence[Question], verify: Verify, composes: bool = False) -> None:
        self.plan, self.questions, self.verify, self.e, self.composes = plan, questions, verify, plan.settings.eval, composes
        self.failures: list[str] = []
        self.result: dict[str, Any] = {"questions": len(questions), "temperature": self.e.temperature, "seed": plan.settings.seed}

    # ---- the policy and the merged folder ------------------------------------------------------------------------------------------

    def trained(self) -> None:
        """What the policy says and thinks: the reference for all that follows."""
        name = self.plan.source.name if self.plan.source.kind == "bundled" else self.plan.source.ref
        model, tokenizer = load(
            name, four_bit=self.plan.nf4, dtype=self.plan.trained_in, adapter=self.plan.run / "adapter", backend="transformers"
        )
        in_float32(model)
        policy = Policy(model, tokenizer, self.e.slots, self.plan.settings.kv_memory, form=self.plan.form)
        episodes = self._ask(policy, "asking the trained policy")
        self.samples = texts(episodes, model.get_input_embeddings().weight.shape[0])
        self.policy_logits = gathered(scorer(model), self.samples)
        with model.disable_adapter():
            self.base_logits = gathered(scorer(model), self.samples)
        self.prompts = [prompt_ids(tokenizer, q.question) for q in self.questions[:CHATS]]
        self.ids = [tokenizer.encode(text, add_special_tokens=False) for text in STRINGS]
        self.unquantised = self._figures(episodes)
        self.result["trained"] = self.unquantised
        self.result["compared"] = {"answers": len(self.samples), "positions": len(self.policy_logits)}

    def merged(self, folder: Path) -> None:
        model, tokenizer = load(str(folder), dtype="float32")
        self.merged_logits = gathered(scorer(model), self.samples)
        near = distance(self.policy_logits, self.merged_logits)
        far = kl(self.merged_logits, self.base_logits)
        self.result["merged"] = {
            "dtype": self.plan.dtype,
            "kl_adapter_merged": near["kl"],
            "kl_merged_base": far,
            "argmax_agreement": near["argmax_agreement"],
            "clear_agreement": near["clear_agreement"],
        }
        del self.base_logits, self.policy_logits
        if far < RATIO * near["kl"] and self.plan.merge == "dequantized":
            self._fail(f"merged weights are {near['kl']:.2g} from the policy, {far:.2g} from its base: less than {RATIO} times nearer")
        if [prompt_ids(tokenizer, q.question) for q in self.questions[:CHATS]] != self.prompts:
            self._fail("the merged folder's chat template gives other prompt ids than training")

    # ---- a GGUF file ---------------------------------------------------------------------------------------------------------------

    def gguf(self, file: Path, kind: str) -> None:
        from gguf import GGUFReader

        found: dict[str, Any] = {"kind": kind, "bytes": file.stat().st_size}
        self.result.setdefault("files", {})[file.name] = found
        dropped = lost(GGUFReader(file))
        found["transformers"] = None if dropped else self._through_transformers(file, budgets=not llama_cpp.available())
        found["llama_cpp"] = self._through_llama_cpp(file) if llama_cpp.available() else None
        for reader in ("transformers", "llama_cpp"):
            if found[reader]:
                self._judge(file.name, kind, reader, found[reader])

    def _through_transformers(self, file: Path, budgets: bool) -> dict[str, Any]:
        model, tokenizer = read(file)
        model = model.float()
        same = [tokenizer.encode(text, add_special_tokens=False) == ids for text, ids in zip(STRINGS, self.ids, strict=True)]
        found = distance(self.merged_logits, gathered(scorer(model), self.samples)) | {"strings_same": sum(same)}
        found["prompts_same"] = sum(prompt_ids(tokenizer, q.question) == ids for q, ids in zip(self.questions, self.prompts, strict=False))
        if budgets:
            policy = Policy(model, tokenizer, self.e.slots, self.plan.settings.kv_memory, form=self.plan.form)
            found["budget"] = self._figures(self._ask(policy, f"asking {file.name}"))
        return found

    def _through_llama_cpp(self, file: Path) -> dict[str, Any]:
        policy = llama_cpp.GgufPolicy(file, self.e.slots, self.plan.settings.kv_memory)
        engine = policy.engine
        scored = gathered(lambda ids: torch.from_numpy(engine.score(ids)), self.samples)
        found: dict[str, Any] = distance(self.merged_logits, scored)
        asked = [self._composed(text) for text in STRINGS]
        found["strings_same"] = sum(engine.tokenize(text) == ids for text, ids in zip(asked, self.ids, strict=True))
        found["strings_composed_first"] = sum(text != string for text, string in zip(asked, STRINGS, strict=True))
        found["prompts_same"] = self._prompts_read(policy)
        found["budget"] = self._figures(self._ask(policy, f"asking {file.name}"))
        engine.close()
        return found | self._chats(file)

    def _prompts_read(self, policy: llama_cpp.GgufPolicy) -> int:
        """Chats whose rendered text llama.cpp reads as the very ids of training."""
        asked = [[{"role": "user", "content": q.question}] for q in self.questions[:CHATS]]
        said = [policy.tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in asked]
        return sum(policy.engine.tokenize(self._composed(text)) == ids for text, ids in zip(said, self.prompts, strict=True))

    def _composed(self, text: str) -> str:
        return normalize("NFC", text) if self.composes else text

    def _chats(self, file: Path) -> dict[str, Any]:
        """Whole chats as a user of llama.cpp has them, its template, sampler and stops: how many end by themselves."""
        with opened(file) as model:
            ended = [chat(model, q.question, i, self.e) for i, q in enumerate(self.questions[:CHATS])]
            prefilled = chat(model, self.questions[0].question, 0, self.e, self._said())
        return {"chats": len(ended), "chats_ended": sum(c.ended for c in ended), "self_stated": ended[0].text, "prefilled": prefilled.text}

    def _said(self) -> tuple[int, str]:
        """A user's number, and how it stands before the answer."""
        budget = max(1, round(2 * (self.unquantised["mean_budget"] or 50)))
        return budget, prefill(budget, self.plan.form)

    def _judge(self, name: str, kind: str, reader: str, found: dict[str, Any]) -> None:
        least = AGREE.get(kind, AGREE_LOW)
        if found["clear_agreement"] < least:
            share = f"{found['clear_agreement']:.2%} of the positions where they are clear"
            self._fail(f"{name} in {reader}: first choices agree at {share}, {least:.1%} is the least")
        for key, wanted in (("strings_same", len(STRINGS)), ("prompts_same", len(self.prompts))):
            if found[key] < wanted:
                self._fail(f"{name} in {reader}: {wanted - found[key]} of {wanted} {key.split('_')[0]} become other tokens")
        allowed = SLACK * CHATS + CHATS * (1 - self.unquantised["ended"])
        if found.get("chats", 0) - found.get("chats_ended", 0) > allowed:
            self._fail(f"{name} in {reader}: {found['chats'] - found['chats_ended']} of {found['chats']} chats did not stop")
        for key in ("format_rate", "ended") if "budget" in found else ():
            if found["budget"][key] < self.unquantised[key] - SLACK:
                self._fail(f"{name} in {reader}: {key} fell from {self.unquantised[key]:.3f} to {found['budget'][key]:.3f}")

    # ---- asking --------------------------------------------------------------------------------------------------------------------

    def _ask(self, policy: Policy, title: str) -> list[Episode]:
        """The same questions and seeds of every policy."""
        requests = [
            policy.request(q.question, self.e.max_tokens, self.plan.settings.seed * 1_000_003 + i) for i, q in enumerate(self.questions)
        ]
        return answer(policy, requests, Sampling(self.e.temperature, self.e.top_p), title)

    def _figures(self, episodes: Sequence[Episode]) -> dict[str, Any]:
        samples: list[Sample] = [judge(q, x, self.verify) for q, x in zip(self.questions, episodes, strict=True)]
        whole = summarise(samples)
        kept = ("accuracy", "mean_tokens", "mean_budget", "format_rate", "within")
        return {key: whole[key] for key in kept} | {"ended": sum(x.stop_reason == "end" for x in episodes) / len(episodes)}

    def _fail(self, reason: str) -> None:
        self.failures.append(reason)


