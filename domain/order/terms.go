package order

import (
	"time"

	"takeout/domain"
)

// Terms is what was ordered, as an event told it: what the other services keep of an order.
type Terms struct {
	OrderID  ID
	Name     string
	Money    domain.Money
	PlacedAt time.Time // UTC
	Version  int64     // of the order that the event told of
}

// Correct takes over what a newer version of the order says, and reports whether the terms changed. It is Invalid if
// now has another amount, or under the same version another name: then it is another order.
func (t *Terms) Correct(now Terms) (bool, error) {
	newer := now.Version > t.Version
	if t.Money != now.Money || t.Name != now.Name && !newer {
		return false, domain.Errorf(domain.Invalid, "order_mismatch",
			"order %s is known with another name or amount than this event says", now.OrderID)
	}
	if !newer || t.Name == now.Name && t.PlacedAt.Equal(now.PlacedAt) {
		return false, nil
	}
	*t = now
	return true, nil
}
