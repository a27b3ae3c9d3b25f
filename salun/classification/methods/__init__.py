"""The unlearning methods of classifiers, which `salun.methods` lists: (task, options) → None changes `task.model`."""
