import copy
import math
import sys

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler
from torchdistill.core.distillation import get_distillation_box
from torchdistill.datasets.registry import register_collate_func
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
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
register_collate_func(collator, key="pad")
model = {
    "forward_proc": "forward_batch_only_as_kwargs",
    "forward_hook": {"output": ["classifier"]},
}
loss = {
    "key": "KDLoss",
    "kwargs": {
        "student_module_path": "classifier",
        "student_module_io": "output",
        "teacher_module_path": "classifier",
        "teacher_module_io": "output",
        "temperature": 2,
        "alpha": 0.5,
    },
}
steps = math.ceil(len(train) / 32)
config = {
    "num_epochs": 6,
    "train_data_loader": {
        "dataset_id": "train",
        "requires_supp": False,
        "sampler": {"class_or_func": RandomSampler},
        "collate_fn": "pad",
        "kwargs": {"batch_size": 32},
    },
    "teacher": {**model, "requires_grad": False},
    "student": model,
    "optimizer": {"key": "AdamW", "kwargs": {"lr": 2e-4}},
    "scheduler": {
        "key": "poly_lr_scheduler",
        "kwargs": {"num_iterations": steps, "num_epochs": 6, "power": 1},
        "scheduling_step": 1,
    },
    "criterion": {
        "key": "WeightedSumLoss",
        "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1}}},
    },
}
device = torch.device("cpu")
box = get_distillation_box(
    big, small, {"train": train}, config, device, None, distributed=False, lr_factor=1
)
for epoch in range(box.num_epochs):
    box.pre_epoch_process(epoch=epoch)
    for batch in box.train_data_loader:
        box.post_forward_process(box.forward_process(batch, batch["labels"]))
    box.post_epoch_process()
small.eval()
with torch.no_grad():
    right = [
        small(**batch).logits.argmax(-1) == batch["labels"]
        for batch in DataLoader(validation, 64, collate_fn=collator)
    ]
print(torch.cat(right).float().mean().item())
