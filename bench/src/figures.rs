//! Samples, what is made of them, and how it is shown.
//!
//! A [`Series`] holds the samples of one thing measured in every round. Of each round a quantile
//! is taken, and of those the median over the rounds: a disturbance of one round moves nothing,
//! and what lasts longer hits a figure and its reference alike, as their rounds alternate.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// One thing measured in every round; samples in nanoseconds for one operation.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<Vec<f64>>);

impl Series {
    /// Adds the samples of one round.
    ///
    /// # Panics
    /// If there are none.
    pub fn push(&mut self, mut samples: Vec<f64>) {
        assert!(!samples.is_empty(), "a round has samples");
        samples.sort_by(f64::total_cmp);
        self.0.push(samples);
    }

    /// The median over the rounds of one quantile of each; `percent` below 100.
    ///
    /// # Panics
    /// Without rounds.
    #[must_use]
    pub fn quantile(&self, percent: usize) -> f64 {
        let mut rounds: Vec<f64> = self
            .0
            .iter()
            .map(|samples| samples[samples.len() * percent / 100])
            .collect();
        rounds.sort_by(f64::total_cmp);
        rounds[rounds.len() / 2]
    }

    /// The percentiles 0 to 100 of all samples; none of fewer than [`MANY`].
    fn percentiles(&self, unit: Unit) -> Vec<f64> {
        let mut samples: Vec<f64> = self.0.concat();
        if samples.len() < MANY {
            return Vec::new();
        }
        samples.sort_by(f64::total_cmp);
        let last = samples.len() - 1;
        (0..=100)
            .map(|percent| unit.of(samples[last * percent / 100]))
            .collect()
    }
}

/// Samples that a distribution is made of, at least.
const MANY: usize = 1000;

/// What a figure is shown in, made from nanoseconds for one operation.
#[derive(Clone, Copy, Debug)]
pub enum Unit {
    /// Time of one operation.
    Nanoseconds,
    /// Time of one operation.
    Microseconds,
    /// Throughput, of an operation that moves so many bytes.
    GigabytesPerSecond(usize),
    /// Operations in a second.
    MillionsPerSecond,
    /// Operations in a second.
    PerSecond,
}

impl Unit {
    fn of(self, nanoseconds: f64) -> f64 {
        match self {
            Unit::Nanoseconds => nanoseconds,
            Unit::Microseconds => nanoseconds / 1e3,
            Unit::GigabytesPerSecond(bytes) => bytes as f64 / nanoseconds,
            Unit::MillionsPerSecond => 1e3 / nanoseconds,
            Unit::PerSecond => 1e9 / nanoseconds,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Unit::Nanoseconds => "ns",
            Unit::Microseconds => "us",
            Unit::GigabytesPerSecond(_) => "GB/s",
            Unit::MillionsPerSecond => "M/s",
            Unit::PerSecond => "/s",
        }
    }
}

/// The bound that a figure's ratio to its reference should keep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// For times.
    AtMost(f64),
    /// For throughputs.
    AtLeast(f64),
}

impl Wanted {
    /// The number.
    #[must_use]
    pub fn bound(self) -> f64 {
        let (Wanted::AtMost(bound) | Wanted::AtLeast(bound)) = self;
        bound
    }

    fn is_met(self, ratio: f64) -> bool {
        match self {
            Wanted::AtMost(bound) => ratio <= bound,
            Wanted::AtLeast(bound) => ratio >= bound,
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::AtMost(bound) => write!(f, "<= {bound}"),
            Wanted::AtLeast(bound) => write!(f, ">= {bound}"),
        }
    }
}

/// One line of the result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// In `unit`.
    pub value: f64,
    /// Of value and reference.
    pub unit: String,
    /// What it is compared with.
    pub reference: String,
    /// In `unit`, from the same run.
    pub reference_value: f64,
    /// `value / reference_value`.
    pub ratio: f64,
    /// The bound on the ratio, where there is one.
    pub wanted: Option<Wanted>,
    /// Whether the ratio keeps it.
    pub met: Option<bool>,
    /// Of a median, if there are samples enough.
    pub distribution: Option<Distribution>,
}

/// The percentiles 0 to 100 of the samples of all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Distribution {
    /// In the figure's unit.
    pub value: Vec<f64>,
    /// Of the reference.
    pub reference: Vec<f64>,
}

impl Figure {
    /// Compares the same quantile of two series.
    #[must_use]
    pub fn new(
        name: &str,
        series: &Series,
        (reference, reference_series): (&str, &Series),
        percent: usize,
        unit: Unit,
        wanted: Option<Wanted>,
    ) -> Figure {
        let value = unit.of(series.quantile(percent));
        let reference_value = unit.of(reference_series.quantile(percent));
        let ratio = value / reference_value;
        Figure {
            name: name.to_owned(),
            value,
            unit: unit.name().to_owned(),
            reference: reference.to_owned(),
            reference_value,
            ratio,
            wanted,
            met: wanted.map(|wanted| wanted.is_met(ratio)),
            distribution: (percent == 50)
                .then(|| Distribution {
                    value: series.percentiles(unit),
                    reference: reference_series.percentiles(unit),
                })
                .filter(|of| !of.value.is_empty() && !of.reference.is_empty()),
        }
    }
}

/// What was measured, and where.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// This one.
    pub machine: Machine,
    /// All of them.
    pub figures: Vec<Figure>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.machine)?;
        let row = |f: &mut fmt::Formatter<'_>, cells: [&str; 7]| {
            let [name, value, unit, reference, reference_value, ratio, wanted] = cells;
            let line = format!(
                "{name:<46} {value:>9} {unit:<4}  {reference:<24} {reference_value:>9}  {ratio:>7}  {wanted}"
            );
            writeln!(f, "{}", line.trim_end())
        };
        row(
            f,
            [
                "figure",
                "value",
                "unit",
                "reference",
                "value",
                "ratio",
                "wanted",
            ],
        )?;
        for figure in &self.figures {
            let missed = if figure.met == Some(false) {
                "  missed"
            } else {
                ""
            };
            let wanted = figure
                .wanted
                .map_or_else(String::new, |wanted| format!("{wanted}{missed}"));
            let (value, reference) = (number(figure.value), number(figure.reference_value));
            let ratio = format!("{:.2}", figure.ratio);
            row(
                f,
                [
                    &figure.name,
                    &value,
                    &figure.unit,
                    &figure.reference,
                    &reference,
                    &ratio,
                    &wanted,
                ],
            )?;
        }
        Ok(())
    }
}

/// Three or four significant digits.
fn number(value: f64) -> String {
    let digits = match value {
        0.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disturbed_round_does_not_move_the_median() {
        let mut series = Series::default();
        for round in [vec![3.0, 1.0, 2.0], vec![900.0; 3], vec![2.0, 1.0, 3.0]] {
            series.push(round);
        }
        assert_eq!(series.quantile(50), 2.0);
        assert_eq!(series.quantile(99), 3.0);
    }

    #[test]
    fn a_throughput_is_better_when_its_ratio_is_higher() {
        let (mut slow, mut fast) = (Series::default(), Series::default());
        slow.push(vec![2000.0]);
        fast.push(vec![1000.0]);
        let unit = Unit::GigabytesPerSecond(1000);
        let figure = Figure::new(
            "read",
            &slow,
            ("native", &fast),
            50,
            unit,
            Some(Wanted::AtLeast(0.7)),
        );
        assert_eq!(
            (figure.value, figure.ratio, figure.met),
            (0.5, 0.5, Some(false))
        );
    }
}
