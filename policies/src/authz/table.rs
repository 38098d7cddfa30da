//! A decision for every case of the facts that policies can tell apart, made by asking Cedar once for each.

use std::net::{IpAddr, Ipv4Addr};

use crate::authz::inspect::Dimension;
use crate::authz::resource::Found;
use crate::authz::{Sample, TlsFacts};

/// Cells of one table at most; what has more is evaluated.
pub(super) const MAX_CELLS: usize = 4_096;

/// One bit for each case.
#[derive(Debug)]
pub(super) struct Table {
    dimensions: Box<[Dimension]>,
    allowed: Box<[u64]>,
    cells: usize,
}

impl Dimension {
    /// How many cases there are.
    pub(super) fn cases(&self) -> usize {
        match self {
            Self::Role(_) | Self::Method(_) | Self::Owner | Self::TlsVersion | Self::ClientCertificate => 2,
            Self::Acr(classes) => classes.len() + 2,
            Self::LoginAge(ages) => ages.len() + 2,
            Self::Department => 3,
            Self::Hour => 24,
            Self::Weekday => 7,
        }
    }

    /// Which of its cases this is.
    fn case(&self, sample: &Sample<'_>) -> usize {
        match self {
            Self::Role(role) => usize::from(sample.roles.iter().any(|it| **it == **role)),
            Self::Method(method) => usize::from(sample.amr.iter().any(|it| **it == **method)),
            Self::Acr(classes) => match sample.acr {
                None => 0,
                Some(acr) => classes.iter().position(|it| **it == *acr).unwrap_or(classes.len()) + 1,
            },
            Self::LoginAge(ages) => match sample.login_age {
                None => 0,
                Some(age) => ages.iter().take_while(|limit| **limit <= age).count() + 1,
            },
            Self::Department => match (sample.department, sample.resource.department.as_deref()) {
                (None, _) => 0,
                (Some(own), Some(other)) if own == other => 1,
                (Some(_), _) => 2,
            },
            Self::Owner => usize::from(sample.resource.owner.as_deref() == Some(sample.subject)),
            Self::TlsVersion => usize::from(sample.tls.tls13),
            Self::ClientCertificate => usize::from(sample.tls.client_certificate),
            Self::Hour => sample.hour().into(),
            Self::Weekday => usize::from(sample.weekday()) - 1,
        }
    }
}

impl Table {
    /// Asks `decide` about an example of every case; `None` where there are too many. The examples' resource has the
    /// attributes of `resource`, and its id.
    pub(super) fn build(
        dimensions: &[Dimension],
        resource: &Found<'_>,
        mut decide: impl FnMut(&Sample<'_>) -> bool,
    ) -> Option<Self> {
        let cells = dimensions
            .iter()
            .try_fold(1_usize, |cells, it| cells.checked_mul(it.cases()))
            .filter(|cells| *cells <= MAX_CELLS)?;
        let mut allowed = vec![0_u64; cells.div_ceil(64)];
        for cell in 0..cells {
            let example = Example::of(dimensions, cell, resource);
            if let Some(word) = allowed.get_mut(cell / 64).filter(|_| decide(&example.sample())) {
                *word |= 1 << (cell % 64);
            }
        }
        Some(Self { dimensions: dimensions.into(), allowed: allowed.into(), cells })
    }

    pub(super) fn allows(&self, sample: &Sample<'_>) -> bool {
        let cell = self.dimensions.iter().fold(0, |cell, it| cell * it.cases() + it.case(sample));
        self.allowed.get(cell / 64).is_some_and(|word| word >> (cell % 64) & 1 == 1)
    }

    /// Whether anybody is allowed who has none of the roles that policies name.
    pub(super) fn allows_without_role(&self) -> bool {
        (0..self.cells).any(|cell| {
            let allowed = self.allowed.get(cell / 64).is_some_and(|word| word >> (cell % 64) & 1 == 1);
            allowed
                && cases(&self.dimensions, cell)
                    .all(|(dimension, case)| case == 0 || !matches!(dimension, Dimension::Role(_)))
        })
    }

    /// One example of every case, with what the table says of it.
    #[cfg(test)]
    pub(super) fn examples<'a>(
        &'a self,
        resource: &'a Found<'a>,
    ) -> impl Iterator<Item = (Example, bool)> + 'a {
        (0..self.cells).map(move |cell| {
            let allowed = self.allowed[cell / 64] >> (cell % 64) & 1 == 1;
            (Example::of(&self.dimensions, cell, resource), allowed)
        })
    }
}

/// The cases of a cell, last dimension first.
fn cases(dimensions: &[Dimension], cell: usize) -> impl Iterator<Item = (&Dimension, usize)> {
    dimensions.iter().rev().scan(cell, |rest, dimension| {
        let case = *rest % dimension.cases();
        *rest /= dimension.cases();
        Some((dimension, case))
    })
}

/// Somebody who asks for something.
#[derive(Debug, Clone)]
pub(super) struct Example {
    roles: Vec<String>,
    department: Option<String>,
    acr: Option<String>,
    amr: Vec<String>,
    login_age: Option<i64>,
    tls: TlsFacts,
    now: u64,
    resource: Found<'static>,
}

/// A value that the policies name nowhere.
const OTHER: &str = "\u{1}other";
const SUBJECT: &str = "\u{1}subject";
const DEPARTMENT: &str = "\u{1}department";

impl Example {
    fn of(dimensions: &[Dimension], cell: usize, resource: &Found<'_>) -> Self {
        let mut example = Self {
            roles: Vec::new(),
            department: None,
            acr: None,
            amr: Vec::new(),
            login_age: None,
            tls: TlsFacts::default(),
            // A Thursday.
            now: 0,
            resource: Found {
                id: resource.id.clone().into_owned().into(),
                department: resource.department.as_ref().map(|_| DEPARTMENT.into()),
                owner: resource.owner.as_ref().map(|_| OTHER.into()),
            },
        };
        for (dimension, case) in cases(dimensions, cell) {
            match (dimension, case) {
                (Dimension::Role(role), 1) => example.roles.push(role.to_string()),
                (Dimension::Method(method), 1) => example.amr.push(method.to_string()),
                (Dimension::Acr(classes), 1..) => {
                    example.acr = Some(classes.get(case - 1).map_or(OTHER, |class| class).to_owned());
                }
                (Dimension::LoginAge(ages), 1..) => {
                    let at = case.checked_sub(2).and_then(|index| ages.get(index));
                    example.login_age = Some(at.copied().unwrap_or(0));
                }
                (Dimension::Department, 1) => example.department = Some(DEPARTMENT.to_owned()),
                (Dimension::Department, 2) => example.department = Some(OTHER.to_owned()),
                (Dimension::Owner, 1) if resource.owner.is_some() => {
                    example.resource.owner = Some(SUBJECT.into());
                }
                (Dimension::TlsVersion, case) => example.tls.tls13 = case == 1,
                (Dimension::ClientCertificate, case) => example.tls.client_certificate = case == 1,
                (Dimension::Hour, case) => example.now += case as u64 * 3_600,
                (Dimension::Weekday, case) => example.now += (case as u64 + 4) % 7 * 86_400,
                _ => {}
            }
        }
        example
    }

    pub(super) fn sample(&self) -> Sample<'_> {
        Sample {
            subject: SUBJECT,
            issuer: OTHER,
            roles: &self.roles,
            department: self.department.as_deref(),
            acr: self.acr.as_deref(),
            amr: &self.amr,
            login_age: self.login_age,
            token_age: None,
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            tls: self.tls,
            now: self.now,
            resource: &self.resource,
        }
    }
}
