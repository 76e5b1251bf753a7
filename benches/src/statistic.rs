//! What is said of a figure that was measured several times.

/// The same figure, once a round.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample(Vec<f64>);

/// What a sample comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Sample {
    /// Takes one more measurement. What is not a number is a mistake of the
    /// caller's: nothing that was measured comes out as one.
    pub fn push(&mut self, value: f64) {
        assert!(value.is_finite(), "measured {value}");
        self.0.push(value);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `None` where nothing was measured.
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Summary { median, min, max })
    }

    pub fn median(&self) -> Option<f64> {
        self.summary().map(|s| s.median)
    }
}

impl FromIterator<f64> for Sample {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut sample = Self::default();
        values.into_iter().for_each(|value| sample.push(value));
        sample
    }
}

impl Summary {
    /// The least by the greatest: 1 when every round agreed. Below 0.8 the
    /// machine was not quiet enough to trust a small difference.
    pub fn spread(&self) -> f64 {
        if self.max == 0.0 { 1.0 } else { self.min / self.max }
    }
}

/// `ours` by `theirs`, where both were measured and theirs is not zero.
pub fn ratio(ours: Option<f64>, theirs: Option<f64>) -> Option<f64> {
    match (ours?, theirs?) {
        (_, 0.0) => None,
        (ours, theirs) => Some(ours / theirs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(values: &[f64]) -> Sample {
        values.iter().copied().collect()
    }

    #[test]
    fn the_median_of_an_odd_number_is_the_middle_in_order_of_size() {
        let summary = sample(&[9.0, 1.0, 100.0, 3.0, 2.0]).summary().unwrap();
        assert_eq!(summary, Summary { median: 3.0, min: 1.0, max: 100.0 });
    }

    #[test]
    fn the_median_of_an_even_number_is_the_mean_of_the_middle_two() {
        assert_eq!(sample(&[4.0, 1.0, 2.0, 100.0]).median(), Some(3.0));
    }

    #[test]
    fn nothing_measured_has_no_median() {
        assert_eq!(Sample::default().summary(), None);
        assert_eq!(ratio(Sample::default().median(), Some(1.0)), None);
    }

    #[test]
    fn one_outlier_moves_the_spread_and_not_the_median() {
        let quiet = sample(&[10.0, 10.0, 10.0]).summary().unwrap();
        let noisy = sample(&[10.0, 10.0, 40.0]).summary().unwrap();
        assert_eq!(quiet.median, noisy.median);
        assert_eq!(quiet.spread(), 1.0);
        assert_eq!(noisy.spread(), 0.25);
    }

    #[test]
    fn a_ratio_by_zero_is_no_ratio() {
        assert_eq!(ratio(Some(1.0), Some(0.0)), None);
        assert_eq!(ratio(Some(1.0), Some(4.0)), Some(0.25));
    }

    #[test]
    fn all_zero_agrees_with_itself() {
        assert_eq!(sample(&[0.0, 0.0]).summary().unwrap().spread(), 1.0);
    }

    #[test]
    #[should_panic(expected = "measured NaN")]
    fn what_is_not_a_number_is_no_measurement() {
        sample(&[f64::NAN]);
    }
}
