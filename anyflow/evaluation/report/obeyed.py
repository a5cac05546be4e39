"""In words, whether a model does what its controls say."""

from __future__ import annotations

from anyflow.evaluation.curve import Curve
from anyflow.simulators.motion import TOLERANCE, path_tolerance

IGNORED = 0.1
"""Share of an obedient model's gap below which a model does nothing with its controls."""


def obedience_lines(curve: Curve) -> list[str]:
    """A sentence on what other controls change; none of a model that is told none, or whose motion is not read."""
    shares = {row.num_steps: row.obedience for row in curve.rows if row.obedience is not None}
    pixels, read = curve.real.swap_gap, curve.real.figure("control_gap")
    if not shares or (pixels is None and read is None):
        return []
    asked = f"the {pixels:.1f} px that" if pixels is not None else f"the {read:.2f} half ranges of their controls that"
    asked += " another clip's controls lead away"
    told = ", ".join(f"{count}: {100 * share:.0f} %" for count, share in shares.items())
    if all(share < IGNORED for share in shares.values()):
        return [f"{curve.label}: the model ignores its controls: of {asked}, samples go, at steps {told}"]
    deaf = [str(count) for count, share in shares.items() if share < IGNORED]
    more = f"; at {', '.join(deaf)} it ignores its controls" if deaf else ""
    return [f"{curve.label}: of {asked}, samples go, at steps {told}{more}"]


def control_notes(curve: Curve) -> list[str]:
    """What the figures of controls mean, where a curve has them."""
    notes = []
    if any(row.path_right is not None for row in curve.rows):
        height, width = curve.size[1:]
        within = [
            f"{path_tolerance(domain, height, width):.1f} px ({domain})"
            for domain in curve.domain.split("+")
            if domain in TOLERANCE
        ]
        notes.append(
            f"Path right: it ends within {', '.join(within)} of where the controls lead; unread ones are wrong."
        )
    if curve.real.swap_gap is not None:
        notes.append(
            "Swap gap: how much farther a sample goes from the path asked for under the controls of another clip, "
            "where these can be followed from its place; 0: the model ignores its controls. The row of real clips says "
            "how far they lead. Obedience: the gap as a share of that; 1 is an obedient model's."
        )
    if curve.real.figure("control_gap") is not None:
        notes.append(
            "Control gap: how much farther the controls that are read back from a sample are from its own clip's if it "
            "gets another clip's, in half ranges of a number; 0: the model ignores its controls. Obedience: the gap as "
            "a share of how far the other clip's are."
        )
    return notes
