"""Check that exported files are the trained policy: logits, tokens, stops and adherence to budgets. Writes nothing.

The reference is the trained policy, base and adapter as in training, on questions of the run's own task. One model is in memory at a
time, beside the logits of the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch

from sbtiny.budget.protocol import render_budget
from sbtiny.evaluation.evaluate import Verify, sample_with_progress, score_answer
from sbtiny.export import verdict
from sbtiny.export.compare import answer_logits, comparison_texts, distance, in_float32, kl, logit_fn
from sbtiny.export.config import ExportConfig
from sbtiny.export.strings import STRINGS
from sbtiny.export.transcripts import chat, open_llama
from sbtiny.models.gguf import dropped_features, read_gguf
from sbtiny.models.load import load_model
from sbtiny.models.prompt import prompt_ids, to_messages
from sbtiny.rollout.engines import llama_cpp
from sbtiny.rollout.episode import Episode
from sbtiny.rollout.load_policy import build_gguf_policy, build_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.sources import Question

CHAT_COUNT = 20
MIN_KL_RATIO = 20  # least (KL merged to base) / (KL policy to merged)


class Check:
    """Compare one export with the trained policy. Call measure_policy, measure_merged, then gguf for each file.

    `result` goes into export.json. `failures`: reasons not to use the export. `unread`: files that no installed program can read.
    `composes`: the tokenizer composes text (NFC). llama.cpp does not, so its texts are composed here first; the README says so to users.
    """

    def __init__(self, plan: ExportConfig, questions: Sequence[Question], verify: Verify, composes: bool = False) -> None:
        self.plan, self.questions, self.verify, self.e, self.composes = plan, questions, verify, plan.settings.eval, composes
        self.failures: list[str] = []
        self.unread: list[str] = []
        self.result: dict[str, Any] = {"questions": len(questions), "temperature": self.e.temperature, "seed": plan.settings.seed}

    # ---- the policy and the merged folder ------------------------------------------------------------------------------------------

    def measure_policy(self) -> None:
        """Sample answers and logits of the trained policy, the reference of all other measurements."""
        name = self.plan.source.name if self.plan.source.kind == "bundled" else self.plan.source.ref
        model, tokenizer = load_model(
            name, four_bit=self.plan.nf4, dtype=self.plan.trained_in, adapter=self.plan.run / "adapter", backend="transformers"
        )
        in_float32(model)
        policy = build_policy(model, tokenizer, self.e.max_num_seqs, self.plan.settings.kv_cache_gib, form=self.plan.form)
        episodes = self._ask(policy, "asking the trained policy")
        self.samples = comparison_texts(episodes, model.get_input_embeddings().weight.shape[0])
        self.policy_logits = answer_logits(logit_fn(model), self.samples)
        with model.disable_adapter():
            self.base_logits = answer_logits(logit_fn(model), self.samples)
        self.prompts = [prompt_ids(tokenizer, q.question, q.system) for q in self.questions[:CHAT_COUNT]]
        self.ids = [tokenizer.encode(text, add_special_tokens=False) for text in STRINGS]
        self.unquantised = self._evaluate(episodes)
        self.result["trained"] = self.unquantised.figures
        self.result["compared"] = {"answers": len(self.samples), "positions": len(self.policy_logits)}

    def measure_merged(self, folder: Path) -> None:
        model, tokenizer = load_model(str(folder), dtype="float32", backend="transformers")
        self.merged_logits = answer_logits(logit_fn(model), self.samples)
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
        if far < MIN_KL_RATIO * near["kl"] and self.plan.merge == "dequantized":
            distances = f"{near['kl']:.2g} from the policy, {far:.2g} from its base"
            self.failures.append(f"merged weights are {distances}: less than {MIN_KL_RATIO} times nearer")
        if [prompt_ids(tokenizer, q.question, q.system) for q in self.questions[:CHAT_COUNT]] != self.prompts:
            self.failures.append("the merged folder's chat template gives other prompt ids than training")

    # ---- a GGUF file ---------------------------------------------------------------------------------------------------------------

    def gguf(self, file: Path, kind: str) -> None:
        """Measure one GGUF file in every program that can read it; add to `result`, `failures` and `unread`."""
        from gguf import GGUFReader

        report: dict[str, Any] = {"kind": kind, "bytes": file.stat().st_size}
        self.result.setdefault("files", {})[file.name] = report
        dropped = dropped_features(GGUFReader(file))
        report["transformers"] = None if dropped else self._through_transformers(file, kind)
        report["llama_cpp"] = self._through_llama_cpp(file, kind) if llama_cpp.is_available() else None
        report["checked"] = bool(report["transformers"] or report["llama_cpp"])
        if not report["checked"]:
            self.unread.append(f"{file.name} has {dropped}, which only llama.cpp reads: pip install 'sbtiny[llama]' and export again")
        for reader in ("transformers", "llama_cpp"):
            if report[reader]:
                reasons = verdict.find_failures(kind, report[reader], len(self.prompts), self._min_chats_ended())
                self.failures += [f"{file.name} in {reader}: {reason}" for reason in reasons]

    def _through_transformers(self, file: Path, kind: str) -> dict[str, Any]:
        model, tokenizer = read_gguf(file)
        model = model.float()
        same = [tokenizer.encode(text, add_special_tokens=False) == ids for text, ids in zip(STRINGS, self.ids, strict=True)]
        found = distance(self.merged_logits, answer_logits(logit_fn(model), self.samples)) | {"strings_same": sum(same)}
        prompts = (prompt_ids(tokenizer, q.question, q.system) for q in self.questions)
        found["prompts_same"] = sum(ids == wanted for ids, wanted in zip(prompts, self.prompts, strict=False))
        if llama_cpp.is_available():  # it answers faster, so sample there alone
            return found
        policy = build_policy(model, tokenizer, self.e.max_num_seqs, self.plan.settings.kv_cache_gib, form=self.plan.form)
        return found | self._answers(policy, file, kind)

    def _through_llama_cpp(self, file: Path, kind: str) -> dict[str, Any]:
        policy = build_gguf_policy(file, self.e.max_num_seqs, self.plan.settings.kv_cache_gib)
        engine = policy.engine
        scored = answer_logits(lambda ids: torch.from_numpy(engine.score(ids)), self.samples)
        found: dict[str, Any] = distance(self.merged_logits, scored)
        texts = [self._composed(text) for text in STRINGS]
        found["strings_same"] = sum(engine.tokenize(text) == ids for text, ids in zip(texts, self.ids, strict=True))
        found["strings_composed_first"] = sum(text != string for text, string in zip(texts, STRINGS, strict=True))
        found["prompts_same"] = self._prompts_read(policy)
        found |= self._answers(policy, file, kind)
        engine.close()
        return found | self._chats(file)

    def _answers(self, policy: Policy, file: Path, kind: str) -> dict[str, Any]:
        evaluated = self._evaluate(self._ask(policy, f"asking {file.name}"))
        return {"budget": evaluated.figures, "falls": verdict.rate_drops(self.unquantised, evaluated, kind)}

    def _prompts_read(self, policy: Policy) -> int:
        """Count the chats that llama.cpp renders and tokenises to the ids of training."""
        chats = [to_messages(q.question, q.system) for q in self.questions[:CHAT_COUNT]]
        texts = [policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        return sum(policy.engine.tokenize(self._composed(text)) == ids for text, ids in zip(texts, self.prompts, strict=True))

    def _composed(self, text: str) -> str:
        return normalize("NFC", text) if self.composes else text

    def _chats(self, file: Path) -> dict[str, Any]:
        """Count the chats that stop by themselves with llama.cpp's own template, sampler and stops."""
        with open_llama(file) as model:
            ended = [chat(model, q.question, i, self.e, system=q.system) for i, q in enumerate(self.questions[:CHAT_COUNT])]
            first = self.questions[0]
            prefilled = chat(model, first.question, 0, self.e, self._given_budget(), first.system)
        return {"chats": len(ended), "chats_ended": sum(c.ended for c in ended), "self_stated": ended[0].text, "prefilled": prefilled.text}

    def _given_budget(self) -> tuple[int, str]:
        """A given budget, twice the mean stated one, and the text it becomes before the answer."""
        budget = max(1, round(2 * (self.unquantised.figures["mean_budget"] or 50)))
        return budget, render_budget(budget, self.plan.form)

    def _min_chats_ended(self) -> float:
        """Least number of chats that must stop: the trained policy's share, less RATE_SLACK."""
        chats = len(self.questions[:CHAT_COUNT])
        return chats - CHAT_COUNT * (verdict.RATE_SLACK + 1 - self.unquantised.figures["ended"])

    # ---- asking --------------------------------------------------------------------------------------------------------------------

    def _ask(self, policy: Policy, title: str) -> list[Episode]:
        """Sample answers with the same questions and seeds for every policy."""
        requests = [
            policy.request(q.question, self.e.max_tokens, self.plan.settings.seed * 1_000_003 + i, system=q.system)
            for i, q in enumerate(self.questions)
        ]
        return sample_with_progress(policy, requests, Sampling(self.e.temperature, self.e.top_p), title)

    def _evaluate(self, episodes: Sequence[Episode]) -> verdict.ExportEval:
        samples = [score_answer(q, x, self.verify) for q, x in zip(self.questions, episodes, strict=True)]
        return verdict.evaluate_policy(samples, [x.stop_reason == "end" for x in episodes])
