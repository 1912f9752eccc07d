"""How large rooms may grow; who may import whom is checked by ``lint-imports``."""

from pathlib import Path

import lightning_fot

ROOT = Path(lightning_fot.__file__).parent


def test_the_root_holds_few_modules() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 8


def test_no_room_holds_more_than_twelve_modules() -> None:
    rooms = {path.parent for path in ROOT.rglob("*.py")} - {ROOT}
    counts = {room: sum(path.name != "__init__.py" for path in room.glob("*.py")) for room in rooms}
    assert not {str(room.relative_to(ROOT)): count for room, count in counts.items() if count > 12}
