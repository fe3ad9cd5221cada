"""The maths room: parameterizations, schedules, steps and plans. Tensors only."""
