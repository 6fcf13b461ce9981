import sys

from kdbook.distillation import annotate
from kdbook.models import student_from, teacher
from kdbook.own_data import read_table
from kdbook.training import fit, hinton_recipe

big = teacher(sys.argv[1])
train, validation = (read_table(path).rows for path in sys.argv[2:4])
recipe = hinton_recipe(epochs=6, lr=2e-4)
run = fit(student_from(big, layers=3), recipe, annotate(train, big), validation)
print(run.best["score"])
