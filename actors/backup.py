"""The backup agent: makes backups, ships, verifies and prunes them, on request and on schedule."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from bus.supervise import Context


class Backup:
    name: ClassVar[str] = "backup"
    owned: ClassVar[bool] = True
    description: ClassVar[str] = "Makes, ships, verifies and prunes backups."

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    async def run(self) -> None:
        self.ctx.ready()
        await asyncio.Event().wait()
