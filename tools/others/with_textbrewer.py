import copy
import sys

import torch
from datasets import Dataset
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
big = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
small = copy.deepcopy(big)
small.bert.encoder.layer = small.bert.encoder.layer[:3]
small.config.num_hidden_layers = 3
encode = lambda batch: tokenizer(batch["text"], truncation=True, max_length=64)
columns = ["input_ids", "attention_mask", "label"]
train, validation = (
    Dataset.from_csv(path).map(encode, batched=True).select_columns(columns)
    for path in sys.argv[2:4]
)
collator = DataCollatorWithPadding(tokenizer)
# The distiller takes a batch apart unless its type is exactly dict.
collate = lambda rows: dict(collator(rows))
loader = DataLoader(train, 32, shuffle=True, collate_fn=collate)
adaptor = lambda batch, outputs: {"logits": outputs.logits, "losses": outputs.loss}
distiller = GeneralDistiller(
    TrainingConfig(device="cpu", output_dir="out"),
    # Its soft loss lacks the factor temperature squared.
    DistillationConfig(temperature=2, hard_label_weight=0.5, kd_loss_weight=0.5 * 4),
    model_T=big,
    model_S=small,
    adaptor_T=adaptor,
    adaptor_S=adaptor,
)
steps = 6 * len(loader)
with distiller:
    distiller.train(
        torch.optim.AdamW(small.parameters(), 2e-4),
        loader,
        num_epochs=6,
        scheduler_class=get_linear_schedule_with_warmup,
        scheduler_args={"num_warmup_steps": 0, "num_training_steps": steps},
    )
small.eval()
with torch.no_grad():
    right = [
        small(**batch).logits.argmax(-1) == batch["labels"]
        for batch in DataLoader(validation, 64, collate_fn=collate)
    ]
print(torch.cat(right).float().mean().item())
