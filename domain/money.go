package domain

import "strconv"

// MaxAmount is the largest amount of one order in minor units: 21,474,836.47 in a currency with two decimals.
// It is what the order_money column of the tables that this program took over can hold.
const MaxAmount = 1<<31 - 1

// Money is a positive amount in minor units (cents, fen) of one currency. The zero Money is no amount at all and
// only NewMoney makes another.
type Money struct {
	amount   int64
	currency string
}

// NewMoney returns an amount of minor units in a currency, an ISO 4217 code such as CNY. It is Invalid if the
// amount is not between 1 and MaxAmount, or the currency is not three capital letters.
func NewMoney(amount int64, currency string) (Money, error) {
	if amount < 1 || amount > MaxAmount {
		return Money{}, InvalidField("amount", "amount_out_of_range",
			"amount must be between 1 and %d minor units", MaxAmount)
	}
	if len(currency) != 3 || !isUpper(currency) {
		return Money{}, InvalidField("currency", "currency_invalid",
			"currency must be an ISO 4217 code of three capital letters, such as CNY")
	}
	return Money{amount, currency}, nil
}

// Amount returns the minor units.
func (m Money) Amount() int64 { return m.amount }

// Currency returns the ISO 4217 code.
func (m Money) Currency() string { return m.currency }

// IsZero reports whether m is no amount at all.
func (m Money) IsZero() bool { return m == Money{} }

// String returns the amount in minor units and the currency: "2850 CNY".
func (m Money) String() string { return strconv.FormatInt(m.amount, 10) + " " + m.currency }

func isUpper(s string) bool {
	for i := range len(s) {
		if s[i] < 'A' || s[i] > 'Z' {
			return false
		}
	}
	return true
}
