package payment_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/domain"
	"takeout/domain/order"
	"takeout/domain/payment"
)

func bill(t *testing.T, amount, version int64, name string) order.Terms {
	t.Helper()
	money, err := domain.NewMoney(amount, "CNY")
	require.NoError(t, err)
	return order.Terms{Name: name, Money: money, Version: version}
}

func TestDecidedPaymentStaysDecided(t *testing.T) {
	t.Parallel()
	for _, state := range []payment.State{payment.Succeeded, payment.Refused, payment.Refunded, payment.Void} {
		p := payment.Payment{State: state}
		require.False(t, p.Succeed("r", time.Now()), "%s", state)
		require.False(t, p.Refuse("no", time.Now()), "%s", state)
		require.Equal(t, payment.Payment{State: state}, p)
	}
}

func TestCancellingAPaymentLeavesNothingCharged(t *testing.T) {
	t.Parallel()
	for before, after := range map[payment.State]payment.State{
		payment.Charging: payment.Void, payment.Succeeded: payment.Refunded,
		payment.Refused: payment.Refused, payment.Refunded: payment.Refunded, payment.Void: payment.Void,
	} {
		p := payment.Payment{State: before}
		require.Equal(t, before != after, p.Cancel(time.Now()), "%s", before)
		require.Equal(t, after, p.State)
	}
}

func TestNewerOrderCorrectsTheNameAndNeverTheAmount(t *testing.T) {
	t.Parallel()
	p := payment.Payment{Bill: bill(t, 100, 2, "tofu")}
	for _, other := range []order.Terms{bill(t, 101, 2, "tofu"), bill(t, 101, 3, "tofu"), bill(t, 100, 2, "rice"), bill(t, 100, 1, "rice")} {
		_, err := p.Bill.Correct(other)
		require.Equal(t, domain.Invalid, domain.KindOf(err), "%+v", other)
	}
	changed, err := p.Bill.Correct(bill(t, 100, 3, "tofu"))
	require.NoError(t, err)
	require.False(t, changed, "nothing is different")
	require.EqualValues(t, 3, p.Bill.Version)
	_, err = p.Bill.Correct(bill(t, 100, 3, "rice"))
	require.Equal(t, domain.Invalid, domain.KindOf(err), "it is not newer than what was heard last")
	changed, err = p.Bill.Correct(bill(t, 100, 4, "rice"))
	require.NoError(t, err)
	require.True(t, changed)
	require.Equal(t, "rice", p.Bill.Name)
}
