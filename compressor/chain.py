"""A chain of methods: what its links are called, and what every method starts from and learns from."""

from __future__ import annotations

from compressor.recipe import Recipe

__all__ = ["chain_lines", "link_names"]


def link_names(recipe: Recipe) -> list[str]:
    """Names of the students that a chain makes on its way: "0-ppcl", "1-dmd2"; the last one is the run's own."""
    return [f"{place}-{entry.name}" for place, entry in enumerate(recipe.methods[:-1])]


def chain_lines(recipe: Recipe) -> list[str]:
    """What every method of a chain starts from and learns from, and what is kept; empty for a single method."""
    from compressor.registry import load_method

    if len(recipe.methods) < 2:
        return []
    lines, before = [], ""
    for entry in recipe.methods:
        needs = load_method(entry.name).needs
        roles = [role for role, count in needs.teachers.items() if count != "any"]
        teachers = [spec for role in roles for spec in recipe.teachers.get(role, [])]
        if before:
            start = f"goes on with the student of {before}"
        elif "copy" in needs.students.values():
            start = f"starts from a copy of {', '.join(teachers) or 'its teacher'}"
        else:
            start = f"trains {', '.join(recipe.students.values()) or 'a student of its own'}"
        pattern = f" {entry.config['pattern']}" if entry.name == "sparsity" else ""
        against = f"; its teacher is {', '.join(teachers)}" if teachers else f"; its teacher is {before or 'that copy'}"
        lines.append(f"{entry.name}{pattern} {start}{against}")
        before = entry.name
    return [*lines, "every student is kept, exported where it can run, measured, and a row of the report"]
