// Candles, volume and P(up) of one series on a canvas; signals that trade are marked by triangles.

import { colour, element } from "./api.js";

const RIGHT = 66; // room for prices
const BOTTOM = 22; // room for times
const PROBABILITY = 54; // height of the strip below the candles
const STEP = 8; // pixels a candle

export const digits = (price) => (price >= 1000 ? 2 : price >= 20 ? 3 : 5);

const two = (number) => String(number).padStart(2, "0");
export const clock = (date) => `${two(date.getUTCHours())}:${two(date.getUTCMinutes())}`;
export const day = (date) => `${date.getUTCFullYear()}-${two(date.getUTCMonth() + 1)}-${two(date.getUTCDate())}`;

export class Chart {
  constructor(canvas, readout) {
    this.canvas = canvas;
    this.readout = readout;
    this.candles = [];
    this.signals = new Map(); // bar time in ms → signal
    this.hover = null;
    this.pending = false;
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointermove", (event) => {
      this.hover = event.offsetX;
      this.draw();
    });
    canvas.addEventListener("pointerleave", () => {
      this.hover = null;
      this.draw();
    });
  }

  get room() {
    return Math.max(20, Math.floor((this.canvas.clientWidth - RIGHT) / STEP));
  }

  show(candles, signals) {
    this.candles = candles.map((candle) => ({ ...candle, at: Date.parse(candle.ts) }));
    this.signals = new Map(signals.map((signal) => [Date.parse(signal.ts), signal]));
    this.draw();
  }

  draw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.paint();
    });
  }

  paint() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.clearRect(0, 0, width, height);
    pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    const bars = this.candles.slice(-this.room);
    if (!bars.length) {
      this.readout.hidden = true;
      return;
    }
    const plot = { left: 0, right: width - RIGHT, top: 14, bottom: height - BOTTOM - PROBABILITY - 8 };
    const low = Math.min(...bars.map((bar) => bar.low));
    const high = Math.max(...bars.map((bar) => bar.high));
    const span = high - low || Math.abs(high) * 1e-4 || 1;
    const y = (price) => plot.bottom - ((price - low) / span) * (plot.bottom - plot.top) * 0.94 - 6;
    const x = (index) => plot.right - (bars.length - index - 0.5) * STEP;
    const place = digits(bars.at(-1).close);

    this.#grid(pen, plot, low, span, y, place, width);
    this.#times(pen, bars, x, height);
    this.#bars(pen, bars, x, y, plot);
    this.#strip(pen, bars, x, { top: height - BOTTOM - PROBABILITY, bottom: height - BOTTOM }, width);
    this.#last(pen, bars.at(-1), y, plot, place, width);
    this.#cross(pen, bars, x, height, place);
  }

  #grid(pen, plot, low, span, y, place, width) {
    const lines = Math.max(2, Math.floor((plot.bottom - plot.top) / 52));
    const rough = span / lines;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    for (let price = Math.ceil(low / step) * step; price <= low + span; price += step) {
      pen.fillStyle = colour("grid");
      pen.fillRect(0, Math.round(y(price)), width - RIGHT, 1);
      pen.fillStyle = colour("dim");
      pen.fillText(price.toFixed(place), width - RIGHT + 8, y(price));
    }
  }

  #times(pen, bars, x, height) {
    pen.textAlign = "center";
    pen.fillStyle = colour("dim");
    const every = Math.ceil(78 / STEP);
    const long = bars.length > 1 && bars[1].at - bars[0].at >= 14_400_000;
    for (let index = bars.length - 1 - Math.floor(every / 2); index > 2; index -= every) {
      const date = new Date(bars[index].at);
      pen.fillText(long ? day(date).slice(5) : clock(date), x(index), height - BOTTOM / 2);
    }
  }

  #bars(pen, bars, x, y, plot) {
    const most = Math.max(...bars.map((bar) => bar.volume)) || 1;
    const [up, down] = [colour("up"), colour("down")];
    bars.forEach((bar, index) => {
      const middle = Math.round(x(index));
      const rising = bar.close >= bar.open;
      pen.fillStyle = rising ? up : down;
      pen.globalAlpha = 0.16;
      const volume = (bar.volume / most) * 46;
      pen.fillRect(middle - STEP / 2 + 1, plot.bottom - volume, STEP - 2, volume);
      pen.globalAlpha = 1;
      pen.fillRect(middle - 0.5, y(bar.high), 1, Math.max(1, y(bar.low) - y(bar.high)));
      const top = y(Math.max(bar.open, bar.close));
      pen.fillRect(middle - STEP / 2 + 1, top, STEP - 2, Math.max(1, y(Math.min(bar.open, bar.close)) - top));
      const label = this.signals.get(bar.at)?.label;
      if (label) triangle(pen, middle, label > 0 ? y(bar.low) + 6 : y(bar.high) - 6, label, label > 0 ? up : down);
    });
  }

  #strip(pen, bars, x, strip, width) {
    const middle = (strip.top + strip.bottom) / 2;
    const half = (strip.bottom - strip.top) / 2 - 4;
    pen.fillStyle = colour("line");
    pen.fillRect(0, strip.top - 4, width, 1);
    pen.fillStyle = colour("grid");
    pen.fillRect(0, Math.round(middle), width - RIGHT, 1);
    pen.fillStyle = colour("dim");
    pen.textAlign = "left";
    pen.fillText("P(up)", width - RIGHT + 8, middle);
    const known = bars.map((bar) => this.signals.get(bar.at)?.prob_up ?? null);
    const reach = Math.max(0.05, ...known.map((value) => (value === null ? 0 : Math.abs(value - 0.5))));
    known.forEach((value, index) => {
      if (value === null) return;
      const size = ((value - 0.5) / reach) * half;
      pen.fillStyle = colour(size >= 0 ? "up" : "down");
      pen.globalAlpha = this.signals.get(bars[index].at).label ? 1 : 0.5;
      pen.fillRect(x(index) - STEP / 2 + 1, Math.min(middle, middle - size), STEP - 2, Math.max(1, Math.abs(size)));
    });
    pen.globalAlpha = 1;
  }

  #last(pen, bar, y, plot, place, width) {
    const at = y(bar.close);
    pen.fillStyle = colour(bar.close >= bar.open ? "up" : "down");
    pen.globalAlpha = 0.5;
    for (let left = 0; left < plot.right; left += 6) pen.fillRect(left, at, 3, 1);
    pen.globalAlpha = 1;
    pen.fillRect(width - RIGHT + 3, at - 9, RIGHT - 6, 18);
    pen.fillStyle = colour("card");
    pen.textAlign = "left";
    pen.fillText(bar.close.toFixed(place), width - RIGHT + 8, at + 0.5);
  }

  #cross(pen, bars, x, height, place) {
    let index = bars.length - 1;
    if (this.hover !== null) {
      index = Math.max(0, Math.min(index, Math.round(index - (x(index) - this.hover) / STEP)));
      pen.fillStyle = colour("dim");
      pen.globalAlpha = 0.6;
      pen.fillRect(Math.round(x(index)), 0, 1, height - BOTTOM);
      pen.globalAlpha = 1;
    }
    const bar = bars[index];
    const date = new Date(bar.at);
    const signal = this.signals.get(bar.at);
    const pairs = [
      ["", `${day(date)} ${clock(date)}`],
      ["O", bar.open.toFixed(place)],
      ["H", bar.high.toFixed(place)],
      ["L", bar.low.toFixed(place)],
      ["C", bar.close.toFixed(place)],
      ["V", String(bar.volume)],
    ];
    if (signal?.prob_up != null) pairs.push(["P(up)", signal.prob_up.toFixed(3)]);
    this.readout.replaceChildren(
      ...pairs.map(([name, value]) =>
        element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })),
      ),
    );
    this.readout.hidden = false;
  }
}

function triangle(pen, x, y, label, fill) {
  pen.fillStyle = fill;
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(x - 5, y + label * 8);
  pen.lineTo(x + 5, y + label * 8);
  pen.fill();
}
