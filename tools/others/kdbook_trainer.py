import sys

import numpy as np
from transformers import TrainingArguments

from kdbook.distillation import annotate
from kdbook.hf import DistillationTrainer
from kdbook.models import student_from, teacher
from kdbook.own_data import read_table
from kdbook.training import Hinton

big = teacher(sys.argv[1])
train, validation = (read_table(path).rows for path in sys.argv[2:4])
trainer = DistillationTrainer(
    student_from(big, layers=3),
    TrainingArguments(
        per_device_train_batch_size=32, num_train_epochs=6, learning_rate=2e-4
    ),
    recipe=Hinton(),
    train_dataset=annotate(train, big),
    eval_dataset=validation,
    compute_metrics=lambda seen: {"score": np.mean(seen[0].argmax(-1) == seen[1])},
)
trainer.train()
print(trainer.evaluate()["eval_score"])
