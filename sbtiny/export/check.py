"""Proof that the files are the trained policy: distances, tokens, chats that stop, budgets that are kept. Writes nothing itself.

Everything is measured on answers the trained policy (base and adapter, as in training) gives to questions of the run's own task. One
model is in memory at a time; of the others only logits are kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch

from sbtiny.budget.protocol import prefill
from sbtiny.evaluation.evaluate import Verify, answer, judge
from sbtiny.export import verdict
from sbtiny.export.compare import distance, gathered, in_float32, kl, scorer, texts
from sbtiny.export.config import Plan
from sbtiny.export.strings import STRINGS
from sbtiny.export.transcripts import chat, opened
from sbtiny.models.gguf import lost, read
from sbtiny.models.load import load
from sbtiny.models.prompt import prompt_ids, turns
from sbtiny.rollout.engines import llama_cpp
from sbtiny.rollout.episode import Episode
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.sources import Question

CHATS = 20
RATIO = 20  # how much nearer to the policy than to its base the merged weights must be


class Check:
    """Measures one export against the trained policy; `result` is what export.json says, `failures` why it must not be used.
    `unread`: files that nothing here can read, and why; of them nothing is known.

    `composes`: the tokenizer brings text into composed form. llama.cpp does not, so it is asked with text that is in it, and the README
    beside the file says that its text must be.
    """

    def __init__(self, plan: Plan, questions: Sequence[Question], verify: Verify, composes: bool = False) -> None:
        self.plan, self.questions, self.verify, self.e, self.composes = plan, questions, verify, plan.settings.eval, composes
        self.failures: list[str] = []
        self.unread: list[str] = []
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
        self.prompts = [prompt_ids(tokenizer, q.question, q.system) for q in self.questions[:CHATS]]
        self.ids = [tokenizer.encode(text, add_special_tokens=False) for text in STRINGS]
        self.unquantised = self._judged(episodes)
        self.result["trained"] = self.unquantised.figures
        self.result["compared"] = {"answers": len(self.samples), "positions": len(self.policy_logits)}

    def merged(self, folder: Path) -> None:
        model, tokenizer = load(str(folder), dtype="float32", backend="transformers")
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
            apart = f"{near['kl']:.2g} from the policy, {far:.2g} from its base"
            self.failures.append(f"merged weights are {apart}: less than {RATIO} times nearer")
        if [prompt_ids(tokenizer, q.question, q.system) for q in self.questions[:CHATS]] != self.prompts:
            self.failures.append("the merged folder's chat template gives other prompt ids than training")

    # ---- a GGUF file ---------------------------------------------------------------------------------------------------------------

    def gguf(self, file: Path, kind: str) -> None:
        from gguf import GGUFReader

        found: dict[str, Any] = {"kind": kind, "bytes": file.stat().st_size}
        self.result.setdefault("files", {})[file.name] = found
        dropped = lost(GGUFReader(file))
        found["transformers"] = None if dropped else self._through_transformers(file, kind)
        found["llama_cpp"] = self._through_llama_cpp(file, kind) if llama_cpp.available() else None
        found["checked"] = bool(found["transformers"] or found["llama_cpp"])
        if not found["checked"]:
            self.unread.append(f"{file.name} has {dropped}, which only llama.cpp reads: pip install 'sbtiny[llama]' and export again")
        for reader in ("transformers", "llama_cpp"):
            if found[reader]:
                why = verdict.reasons(kind, found[reader], len(self.prompts), self._chats_ending())
                self.failures += [f"{file.name} in {reader}: {reason}" for reason in why]

    def _through_transformers(self, file: Path, kind: str) -> dict[str, Any]:
        model, tokenizer = read(file)
        model = model.float()
        same = [tokenizer.encode(text, add_special_tokens=False) == ids for text, ids in zip(STRINGS, self.ids, strict=True)]
        found = distance(self.merged_logits, gathered(scorer(model), self.samples)) | {"strings_same": sum(same)}
        now = (prompt_ids(tokenizer, q.question, q.system) for q in self.questions)
        found["prompts_same"] = sum(ids == wanted for ids, wanted in zip(now, self.prompts, strict=False))
        if llama_cpp.available():  # which answers faster
            return found
        return found | self._answers(Policy(model, tokenizer, self.e.slots, self.plan.settings.kv_memory, form=self.plan.form), file, kind)

    def _through_llama_cpp(self, file: Path, kind: str) -> dict[str, Any]:
        policy = llama_cpp.GgufPolicy(file, self.e.slots, self.plan.settings.kv_memory)
        engine = policy.engine
        scored = gathered(lambda ids: torch.from_numpy(engine.score(ids)), self.samples)
        found: dict[str, Any] = distance(self.merged_logits, scored)
        asked = [self._composed(text) for text in STRINGS]
        found["strings_same"] = sum(engine.tokenize(text) == ids for text, ids in zip(asked, self.ids, strict=True))
        found["strings_composed_first"] = sum(text != string for text, string in zip(asked, STRINGS, strict=True))
        found["prompts_same"] = self._prompts_read(policy)
        found |= self._answers(policy, file, kind)
        engine.close()
        return found | self._chats(file)

    def _answers(self, policy: Policy, file: Path, kind: str) -> dict[str, Any]:
        judged = self._judged(self._ask(policy, f"asking {file.name}"))
        return {"budget": judged.figures, "falls": verdict.falls(self.unquantised, judged, kind)}

    def _prompts_read(self, policy: llama_cpp.GgufPolicy) -> int:
        """Chats whose rendered text llama.cpp reads as the very ids of training."""
        asked = [turns(q.question, q.system) for q in self.questions[:CHATS]]
        said = [policy.tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in asked]
        return sum(policy.engine.tokenize(self._composed(text)) == ids for text, ids in zip(said, self.prompts, strict=True))

    def _composed(self, text: str) -> str:
        return normalize("NFC", text) if self.composes else text

    def _chats(self, file: Path) -> dict[str, Any]:
        """Whole chats as a user of llama.cpp has them, its template, sampler and stops: how many end by themselves."""
        with opened(file) as model:
            ended = [chat(model, q.question, i, self.e, system=q.system) for i, q in enumerate(self.questions[:CHATS])]
            first = self.questions[0]
            prefilled = chat(model, first.question, 0, self.e, self._said(), first.system)
        return {"chats": len(ended), "chats_ended": sum(c.ended for c in ended), "self_stated": ended[0].text, "prefilled": prefilled.text}

    def _said(self) -> tuple[int, str]:
        """A user's number, and how it stands before the answer."""
        budget = max(1, round(2 * (self.unquantised.figures["mean_budget"] or 50)))
        return budget, prefill(budget, self.plan.form)

    def _chats_ending(self) -> float:
        chats = len(self.questions[:CHATS])
        return chats - CHATS * (verdict.SLACK + 1 - self.unquantised.figures["ended"])

    # ---- asking --------------------------------------------------------------------------------------------------------------------

    def _ask(self, policy: Policy, title: str) -> list[Episode]:
        """The same questions and seeds of every policy."""
        requests = [
            policy.request(q.question, self.e.max_tokens, self.plan.settings.seed * 1_000_003 + i, system=q.system)
            for i, q in enumerate(self.questions)
        ]
        return answer(policy, requests, Sampling(self.e.temperature, self.e.top_p), title)

    def _judged(self, episodes: Sequence[Episode]) -> verdict.Asked:
        samples = [judge(q, x, self.verify) for q, x in zip(self.questions, episodes, strict=True)]
        return verdict.asked(samples, [x.stop_reason == "end" for x in episodes])
