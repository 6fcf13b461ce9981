import copy
import sys

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
big = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
small = copy.deepcopy(big)
small.bert.encoder.layer = small.bert.encoder.layer[:3]
small.config.num_hidden_layers = 3
encode = lambda batch: tokenizer(batch["text"], truncation=True, max_length=64)
train, validation = (
    Dataset.from_csv(path).map(encode, batched=True) for path in sys.argv[2:4]
)


@torch.no_grad()
def annotate(batch):
    inputs = tokenizer.pad({"input_ids": batch["input_ids"]}, return_tensors="pt")
    return {"teacher_logits": big(**inputs).logits.numpy()}


class Collator(DataCollatorWithPadding):
    def __call__(self, rows):
        told = [row.pop("teacher_logits", None) for row in rows]
        batch = super().__call__(rows)
        if told[0] is not None:
            batch["teacher_logits"] = torch.tensor(told)
        return batch


class DistillationTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **others):
        teacher_logits = inputs.pop("teacher_logits", None)
        outputs = model(**inputs)
        loss = outputs.loss
        if teacher_logits is not None:
            log_q = F.log_softmax(outputs.logits / 2, -1)
            log_p = F.log_softmax(teacher_logits / 2, -1)
            soft = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
            loss = 0.5 * 4 * soft + 0.5 * loss
        return (loss, outputs) if return_outputs else loss


keep = ["input_ids", "attention_mask", "label", "teacher_logits"]
trainer = DistillationTrainer(
    small,
    TrainingArguments(
        "out",
        num_train_epochs=6,
        learning_rate=2e-4,
        per_device_train_batch_size=32,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
    ),
    Collator(tokenizer),
    train.map(annotate, batched=True, batch_size=64).select_columns(keep),
    validation.select_columns(keep[:3]),
    compute_metrics=lambda seen: {"score": np.mean(seen[0].argmax(-1) == seen[1])},
)
trainer.model_accepts_loss_kwargs = False
trainer.train()
print(trainer.evaluate()["eval_score"])
