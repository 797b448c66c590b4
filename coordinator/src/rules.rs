//! Rules by which a segment's key decides on its consistency.

use std::str::FromStr;

use migshm_protocol::call::Consistency;
use serde::{Deserialize, Serialize};

/// The keys of segments that have release consistency, unless their creator says otherwise.
///
/// Written as keys and ranges of keys, separated by commas, in decimal or hexadecimal:
///
/// ```
/// use migshm_coordinator::Rules;
/// use migshm_protocol::call::Consistency;
///
/// let rules: Rules = "17, 0x1000-0x1fff".parse()?;
/// assert_eq!(rules.consistency(0x1234), Consistency::Release);
/// assert_eq!(rules.consistency(18), Consistency::Sequential);
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// First and last key of each range, as unsigned numbers.
    release: Vec<(u32, u32)>,
    /// The same, of segments that are durable too.
    durable: Vec<(u32, u32)>,
}

impl Rules {
    /// These rules, and segments with the keys of the other ones are durable.
    #[must_use]
    pub fn with_durable(self, keys: Rules) -> Rules {
        Rules {
            durable: keys.release,
            ..self
        }
    }

    /// What a segment with this key has.
    #[must_use]
    pub fn consistency(&self, key: i32) -> Consistency {
        let key = key.cast_unsigned();
        let holds = |&(first, last): &(u32, u32)| first <= key && key <= last;
        if self.durable.iter().any(holds) {
            Consistency::Durable
        } else if self.release.iter().any(holds) {
            Consistency::Release
        } else {
            Consistency::Sequential
        }
    }
}

impl FromStr for Rules {
    type Err = String;

    fn from_str(text: &str) -> Result<Rules, String> {
        let ranges = text
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty());
        let release = ranges.map(parse_range).collect::<Result<_, _>>()?;
        let durable = Vec::new();
        Ok(Rules { release, durable })
    }
}

fn parse_range(text: &str) -> Result<(u32, u32), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (parse_key(first.trim()), parse_key(last.trim())) {
        (Some(first), Some(last)) if first <= last => Ok((first, last)),
        _ => Err(format!(
            "{text:?} is no key and no range of keys, like 17 or 0x1000-0x1fff"
        )),
    }
}

fn parse_key(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_numbers_of_32_bits() {
        let rules: Rules = "0xfe000000 - 0xffffffff,3".parse().expect("rules");
        assert_eq!(rules.consistency(-1), Consistency::Release);
        assert_eq!(rules.consistency(3), Consistency::Release);
        assert_eq!(rules.consistency(4), Consistency::Sequential);
        let durable = "4".parse().expect("rules");
        let rules = rules.with_durable(durable);
        assert_eq!(rules.consistency(4), Consistency::Durable);
        assert_eq!(rules.consistency(3), Consistency::Release);
        assert_eq!("".parse(), Ok(Rules::default()));
        for bad in ["x", "5-4", "1-", "-1", "0x1g", "1 2", "5000000000"] {
            assert!(bad.parse::<Rules>().is_err(), "{bad}");
        }
    }
}
