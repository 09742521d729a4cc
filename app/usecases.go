package app

// UseCases are those of all services. Those of services that run elsewhere, or that there are not, may be nil.
type UseCases struct {
	Orders       *Orders
	Compensation *Compensation
	Dispatches   *Dispatches
	Payments     *Payments
	Points       *Points
}
