"""Names that are pure functions of what they name: of a row's features, and of a signal."""

from __future__ import annotations

import math
from datetime import datetime
from hashlib import blake2b
from struct import Struct as Packer
from typing import Final

from schema.messages import FeatureRow

_HASHED: Final = Packer("<q10d")


def features_hash(symbol: str, timeframe: str, row: FeatureRow) -> str:
    """BLAKE2b-128 in hex over series, open time and the features that a signal may depend on.

    ``fwd_ret_5`` is excluded: it is the future. So are the candle's other prices and its revision: where they change
    no feature, the signal stands. Null is hashed as one fixed NaN.
    """
    nan = math.nan
    digest = blake2b(f"{symbol}\0{timeframe}\0{'ready' if row.ready else 'warming'}\0".encode(), digest_size=16)
    digest.update(
        _HASHED.pack(
            round(row.ts.timestamp()),
            row.close,
            row.volume,
            row.spread,
            nan if row.rsi is None else row.rsi,
            nan if row.macd is None else row.macd,
            nan if row.macd_signal is None else row.macd_signal,
            nan if row.macd_hist is None else row.macd_hist,
            nan if row.atr is None else row.atr,
            nan if row.ma60 is None else row.ma60,
            nan if row.ret_1 is None else row.ret_1,
        )
    )
    return digest.hexdigest()


def signal_id(symbol: str, timeframe: str, ts: datetime, model_version: str | None, features_hash: str) -> str:
    """BLAKE2b-128 in hex: the same bar, model and features give the same id, live and in any replay."""
    text = f"{symbol}\0{timeframe}\0{round(ts.timestamp())}\0{model_version or ''}\0{features_hash}"
    return blake2b(text.encode(), digest_size=16).hexdigest()
