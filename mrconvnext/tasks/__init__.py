"""The sequence tasks: their data read, put into batches and, where no one need download it, generated."""

from .datasets import TASKS, DataError, Task, collate, open_task

__all__ = ["TASKS", "DataError", "Task", "collate", "open_task"]
