"""The student's side: schedule of views, the batch's targets, adapters and one distillation step."""
