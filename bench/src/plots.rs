//! Figures as pictures: SVG, written by hand.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use crate::figures::{Distribution, Figure, Report};
use crate::speed_up::ONE_NODE;

/// Draws what the report contains into files of a directory, which is made: `ratios.svg`,
/// `faults.svg`, `speed-ups.svg`.
///
/// # Errors
/// They cannot be written.
pub fn draw(report: &Report, directory: &Path) -> io::Result<()> {
    let (speed_ups, others): (Vec<&Figure>, Vec<&Figure>) = report
        .figures
        .iter()
        .partition(|figure| figure.reference == ONE_NODE);
    let distributions: Vec<_> = report
        .figures
        .iter()
        .filter_map(|figure| Some((figure, figure.distribution.as_ref()?)))
        .collect();
    let caption = report.machine.to_string();
    fs::create_dir_all(directory)?;
    let write = |name: &str, picture: String| fs::write(directory.join(name), picture);
    if !others.is_empty() {
        let title = "Ratio to the reference of the same run";
        let bounds = others
            .iter()
            .filter_map(|figure| Some(figure.wanted?.bound()));
        let ratios = others.iter().map(|figure| figure.ratio);
        let scale = Scale::logarithmic(ratios.chain(bounds));
        write("ratios.svg", bars(title, &caption, &others, &scale))?;
    }
    if !speed_ups.is_empty() {
        let title = "Speed-up by a second node, a core each";
        let scale = Scale::linear(2.0);
        write("speed-ups.svg", bars(title, &caption, &speed_ups, &scale))?;
    }
    if !distributions.is_empty() {
        write("faults.svg", curves(&caption, &distributions))?;
    }
    Ok(())
}

/// How numbers become places, in pixels of an axis.
struct Scale {
    logarithmic: bool,
    low: f64,
    high: f64,
    /// Where the axis has lines.
    ticks: Vec<f64>,
    /// Where bars begin.
    base: f64,
}

impl Scale {
    fn linear(high: f64) -> Scale {
        let ticks = (0..=4).map(|tick| f64::from(tick) * high / 4.0).collect();
        Scale {
            logarithmic: false,
            low: 0.0,
            high,
            ticks,
            base: 0.0,
        }
    }

    /// Contains the values and 1.
    fn logarithmic(values: impl Iterator<Item = f64>) -> Scale {
        let (low, high) = values
            .filter(|value| *value > 0.0)
            .fold((1.0_f64, 1.0_f64), |(low, high), value| {
                (low.min(value), high.max(value))
            });
        let (low, high) = (low / 1.1, high * 1.1);
        let decades =
            (-9..=9).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)));
        let mut ticks: Vec<f64> = decades.filter(|tick| (low..=high).contains(tick)).collect();
        if ticks.len() > 9 {
            ticks.retain(|tick| tick.log10().fract().abs() < 1e-9);
        }
        Scale {
            logarithmic: true,
            low,
            high,
            ticks,
            base: 1.0,
        }
    }

    /// The place of a value on an axis of so many pixels.
    fn place(&self, value: f64, pixels: f64) -> f64 {
        let value = value.clamp(self.low, self.high);
        let share = if self.logarithmic {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        share * pixels
    }
}

const INK: &str = "#222222";
const FAINT: &str = "#dddddd";
const GREY: &str = "#999999";
const BLUE: &str = "#0072b2";
const GREEN: &str = "#009e73";
const RED: &str = "#d55e00";

/// A row for each figure: its name, a bar from 1 (or 0) to its ratio, a mark at what is wanted.
fn bars(title: &str, caption: &str, figures: &[&Figure], scale: &Scale) -> String {
    const ROW: f64 = 24.0;
    const TOP: f64 = 78.0;
    const LEFT: f64 = 370.0;
    const AXIS: f64 = 420.0;
    const RIGHT: f64 = 130.0;
    let bottom = TOP + ROW * figures.len() as f64;
    let mut picture = Picture::new(LEFT + AXIS + RIGHT, bottom + 44.0, title, caption);
    for tick in &scale.ticks {
        let x = LEFT + scale.place(*tick, AXIS);
        picture.line([x, TOP - 4.0, x, bottom], FAINT, 1.0);
        picture.text([x, bottom + 16.0], "middle", 11, &short(*tick));
    }
    let base = LEFT + scale.place(scale.base, AXIS);
    for (row, figure) in figures.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let end = LEFT + scale.place(figure.ratio, AXIS);
        let colour = match figure.met {
            Some(true) => GREEN,
            Some(false) => RED,
            None => GREY,
        };
        picture.text([LEFT - 10.0, y + 16.0], "end", 13, &figure.name);
        picture.rectangle(
            [
                base.min(end),
                y + 4.0,
                (end - base).abs().max(1.0),
                ROW - 8.0,
            ],
            colour,
        );
        let ratio = format!("{:.2}", figure.ratio);
        picture.text([LEFT + AXIS + 56.0, y + 16.0], "end", 12, &ratio);
        if let Some(wanted) = figure.wanted {
            let x = LEFT + scale.place(wanted.bound(), AXIS);
            picture.line([x, y + 1.0, x, y + ROW - 1.0], INK, 2.5);
            let text = wanted.to_string().replace("<=", "≤").replace(">=", "≥");
            picture.text([LEFT + AXIS + RIGHT - 12.0, y + 16.0], "end", 12, &text);
        }
    }
    picture.line([base, TOP - 4.0, base, bottom], INK, 1.0);
    let mut x = LEFT;
    for (colour, meaning) in [(GREEN, "as wanted"), (RED, "missed"), (GREY, "no bound")] {
        picture.rectangle([x, bottom + 26.0, 12.0, 10.0], colour);
        picture.text([x + 17.0, bottom + 35.0], "start", 11, meaning);
        x += 100.0;
    }
    picture.line([x + 5.0, bottom + 24.0, x + 5.0, bottom + 38.0], INK, 2.5);
    picture.text([x + 12.0, bottom + 35.0], "start", 11, "wanted");
    picture.finish()
}

/// A panel for each figure: the shares of samples below a time, of itself and of its reference.
fn curves(caption: &str, figures: &[(&Figure, &Distribution)]) -> String {
    const COLUMNS: usize = 3;
    const WIDTH: f64 = 320.0;
    const HEIGHT: f64 = 210.0;
    const TOP: f64 = 66.0;
    const MARGIN: f64 = 40.0;
    const AXIS: [f64; 2] = [WIDTH - MARGIN - 24.0, HEIGHT - 72.0];
    let columns = figures.len().min(COLUMNS);
    let mut picture = Picture::new(
        (WIDTH * columns as f64 + 10.0).max(660.0),
        TOP + HEIGHT * figures.len().div_ceil(COLUMNS) as f64,
        "Samples below a time, in percent",
        caption,
    );
    for (index, (figure, distribution)) in figures.iter().enumerate() {
        let x = WIDTH * (index % COLUMNS) as f64 + MARGIN;
        let y = TOP + HEIGHT * (index / COLUMNS) as f64 + 34.0;
        let name = figure.name.trim_end_matches(", p50");
        picture.text([x, y - 20.0], "start", 13, name);
        let series = [
            (&distribution.reference, GREY, figure.reference.as_str()),
            (&distribution.value, BLUE, "migshm"),
        ];
        // Without the slowest of a hundred, which would squeeze the rest.
        let shown = |quantiles: &Vec<f64>| quantiles[..quantiles.len() - 1].to_vec();
        let high = series
            .iter()
            .flat_map(|(quantiles, ..)| shown(quantiles))
            .fold(0.0, f64::max);
        let scale = Scale::linear(round_up(high));
        for tick in &scale.ticks {
            let at = x + scale.place(*tick, AXIS[0]);
            picture.line([at, y, at, y + AXIS[1]], FAINT, 1.0);
            picture.text([at, y + AXIS[1] + 14.0], "middle", 10, &short(*tick));
        }
        let unit = [x + AXIS[0], y + AXIS[1] + 28.0];
        picture.text(unit, "end", 10, &figure.unit);
        for percent in [0.0, 50.0, 100.0] {
            let at = y + AXIS[1] * (1.0 - percent / 100.0);
            picture.line([x, at, x + AXIS[0], at], FAINT, 1.0);
            picture.text([x - 5.0, at + 4.0], "end", 10, &short(percent));
        }
        for (number, (quantiles, colour, name)) in series.into_iter().enumerate() {
            let points = shown(quantiles)
                .into_iter()
                .enumerate()
                .map(|(percent, value)| {
                    let share = percent as f64 / (quantiles.len() - 1) as f64;
                    (x + scale.place(value, AXIS[0]), y + AXIS[1] * (1.0 - share))
                });
            picture.curve(points, colour);
            let left = x + 110.0 * (1 - number) as f64;
            let legend = y + AXIS[1] + 28.0;
            picture.line([left, legend - 4.0, left + 16.0, legend - 4.0], colour, 2.5);
            picture.text([left + 20.0, legend], "start", 10, name);
        }
    }
    picture.finish()
}

/// The next of 1, 2, 4, 6, 8, 10, ... times a power of ten.
fn round_up(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let digit = [1.0, 2.0, 4.0, 6.0, 8.0]
        .into_iter()
        .find(|digit| digit * power >= value);
    digit.unwrap_or(10.0) * power
}

/// As few digits as tell what it is.
fn short(value: f64) -> String {
    format!("{}", (value * 1e6).round() / 1e6)
}

/// The text of an SVG, as far as it is drawn.
struct Picture(String);

impl Picture {
    fn new(width: f64, height: f64, title: &str, caption: &str) -> Picture {
        let mut picture = Picture(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" fill=\"{INK}\">\n"
        ));
        picture.rectangle([0.0, 0.0, width, height], "white");
        picture.text([16.0, 28.0], "start", 18, title);
        picture.text([16.0, 48.0], "start", 11, caption);
        picture
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }

    fn add(&mut self, element: std::fmt::Arguments) {
        writeln!(self.0, "{element}").expect("a string takes everything");
    }

    fn line(&mut self, [x1, y1, x2, y2]: [f64; 4], colour: &str, width: f64) {
        self.add(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" \
             stroke=\"{colour}\" stroke-width=\"{width}\"/>"
        ));
    }

    fn rectangle(&mut self, [x, y, width, height]: [f64; 4], colour: &str) {
        self.add(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
             fill=\"{colour}\"/>"
        ));
    }

    fn text(&mut self, [x, y]: [f64; 2], anchor: &str, size: u32, text: &str) {
        let text = text
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;");
        self.add(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{text}</text>"
        ));
    }

    fn curve(&mut self, points: impl Iterator<Item = (f64, f64)>, colour: &str) {
        let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.add(format_args!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            points.join(" ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_begins_and_ends_where_its_axis_does() {
        let linear = Scale::linear(2.0);
        assert_eq!(
            [0.0, 1.0, 2.0, 9.0].map(|v| linear.place(v, 10.0)),
            [0.0, 5.0, 10.0, 10.0]
        );
        let scale = Scale::logarithmic([0.1, 10.0].into_iter());
        assert!((scale.place(1.0, 10.0) - 5.0).abs() < 1e-9);
        assert_eq!(scale.ticks.first(), Some(&0.1));
    }

    #[test]
    fn an_axis_ends_at_a_round_number() {
        assert_eq!(
            [0.7, 123.0, 400.0, 900.0].map(round_up),
            [0.8, 200.0, 400.0, 1000.0]
        );
    }

    #[test]
    fn text_is_escaped() {
        let mut picture = Picture::new(1.0, 1.0, "a < b", "c & d");
        picture.text([0.0, 0.0], "start", 1, "e -> f");
        let text = picture.finish();
        assert!(text.contains(">a &lt; b<") && text.contains(">c &amp; d<"));
        assert!(text.contains(">e -&gt; f<"));
    }
}
