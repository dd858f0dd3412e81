"""A real model on four small tasks: its weights from a package, data made by programs, answers judged by programs."""
