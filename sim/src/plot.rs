//! Line plots as SVG, both axes logarithmic.

use std::fmt::Write as _;

/// A curve.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Shown beside the picture.
    pub name: String,
    /// Curves of one colour belong together.
    pub colour: usize,
    /// How curves of one colour are told apart.
    pub is_dashed: bool,
    /// x and y, above 0.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
/// Of the plane in the picture.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 560.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 350.0;
/// Least height of the plane in powers of ten.
const DECADES: f64 = 1.0;
/// Of Okabe and Ito: told apart also by those who see fewer colours.
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999",
];

/// A picture of curves over the number of nodes, and of a limit that they are to keep.
#[must_use]
pub fn plot(title: &str, y_axis: &str, limit: Option<f64>, curves: &[Curve]) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let (x_min, x_max) = range(points().map(|(x, _)| x.log2()));
    let (y_min, y_max) = range(points().map(|(_, y)| *y).chain(limit).map(f64::log10));
    let (y_min, y_max) = (y_min.floor(), y_max.ceil().max(y_min.floor() + DECADES));
    let x = |value: f64| LEFT + (value.log2() - x_min) / (x_max - x_min).max(1.0) * (RIGHT - LEFT);
    let y = |value: f64| BOTTOM - (value.log10() - y_min) / (y_max - y_min) * (BOTTOM - TOP);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{title}</text>\n"
    );
    let mut exponent = y_min;
    while exponent <= y_max {
        let at = y(10f64.powf(exponent));
        let label = label(exponent);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1}H{RIGHT}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT - 6.0,
            at + 4.0
        );
        exponent += 1.0;
    }
    let mut nodes = 2f64.powf(x_min.ceil());
    while nodes.log2() <= x_max {
        let at = x(nodes);
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {TOP}V{BOTTOM}\" stroke=\"#eee\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{nodes}</text>",
            BOTTOM + 17.0
        );
        nodes *= 2.0;
    }
    let (middle, centre) = ((LEFT + RIGHT) / 2.0, (TOP + BOTTOM) / 2.0);
    let _ = writeln!(
        svg,
        "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">nodes</text>\
         <text transform=\"translate(18 {centre}) rotate(-90)\" text-anchor=\"middle\">{y_axis}</text>",
        BOTTOM + 38.0
    );
    if let Some(limit) = limit {
        let at = y(limit);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1}H{RIGHT}\" stroke=\"#c00\" stroke-dasharray=\"2 3\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#c00\">at most {limit}</text>",
            RIGHT - 4.0,
            at - 5.0
        );
    }
    for (at, curve) in curves.iter().enumerate() {
        let Curve { name, points, .. } = curve;
        let colour = COLOURS[curve.colour % COLOURS.len()];
        let dashes = if curve.is_dashed { "6 3" } else { "none" };
        let place = |&(a, b): &(f64, f64)| format!("{:.1},{:.1}", x(a), y(b));
        let places: Vec<String> = points.iter().map(place).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
             stroke-dasharray=\"{dashes}\"/>",
            places.join(" ")
        );
        for point in points {
            let (a, b) = (x(point.0), y(point.1));
            let _ = writeln!(
                svg,
                "<circle cx=\"{a:.1}\" cy=\"{b:.1}\" r=\"2.5\" fill=\"{colour}\"/>"
            );
        }
        let row = TOP + 10.0 + 20.0 * at as f64;
        let _ = writeln!(
            svg,
            "<path d=\"M{} {row}h24\" stroke=\"{colour}\" stroke-width=\"2\" \
             stroke-dasharray=\"{dashes}\"/><text x=\"{}\" y=\"{}\">{name}</text>",
            RIGHT + 14.0,
            RIGHT + 44.0,
            row + 4.0
        );
    }
    svg + "</svg>\n"
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let start = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = values.fold(start, |(low, high), v| (low.min(v), high.max(v)));
    if low.is_finite() {
        (low, high)
    } else {
        (0.0, 1.0)
    }
}

fn label(exponent: f64) -> String {
    match exponent as i32 {
        6.. => format!("{}M", 10f64.powf(exponent - 6.0)),
        3..6 => format!("{}k", 10f64.powf(exponent - 3.0)),
        _ => format!("{}", 10f64.powf(exponent)),
    }
}
